"""Names of models and data: folders here, or repositories on the Hub."""

from pathlib import Path
from typing import Literal

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import GatedRepoError, HFValidationError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.errors import RepositoryNotFoundError as NotFoundError
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import validate_repo_id

KINDS = {"model": "model", "dataset": "data set"}
SECONDS = 10  # to wait for the Hub


def check_name(name: str | Path, repo_type: Literal["model", "dataset"] = "model") -> None:
    r"""
    Raises an error of one line for a name with nothing behind it, before a library tries it in all ways that it knows.

    Args:
        name (`str` or `Path`): Directory or Hub id.
        repo_type (`str`, defaults to `"model"`): What is to be there: `"model"` or `"dataset"`.

    Raises:
        `FileNotFoundError`: if there is no such directory, and no such repository on the Hub.
        `NotADirectoryError`: if it is a file.
        `ConnectionError`: if there is no such directory, and the Hub can't be asked for the model. (Data that were
            downloaded before are found without the Hub.)
    """
    if Path(name).is_dir():
        return
    if Path(name).exists():
        hint = "; convert_checkpoint.py makes a directory of it" if Path(name).suffix in (".pth", ".pt") else ""
        raise NotADirectoryError(f"{name} must be a directory or a Hub id, but is a file{hint}")
    if not is_hub_id(name):
        raise FileNotFoundError(f"{name}: there is no such folder")
    downloaded = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=str(name), repo_type=repo_type), "snapshots")
    if downloaded.is_dir():
        return
    try:
        HfApi().repo_info(str(name), repo_type=repo_type, timeout=SECONDS)
    except GatedRepoError:
        return  # the library says how to get access
    except NotFoundError as error:
        kind = KINDS[repo_type]
        raise FileNotFoundError(f"{name}: there is no such folder, and no such {kind} on the Hub") from error
    except (HTTPError, OfflineModeIsEnabled, OSError) as error:
        if repo_type == "model":
            raise unreachable(name) from error


def unreachable(name: str | Path) -> ConnectionError:
    """What to raise for a name that is no folder and can't be looked up."""
    return ConnectionError(f"{name}: there is no such folder, and the Hub can't be reached")


def check_hub_id(argument: str, name: str, owned: bool = True) -> None:
    """Raises `ValueError` for what can't be a repository on the Hub, `OWNER/NAME`, or, not `owned`, an owner."""
    if not is_hub_id(name) or ("/" in name) != owned:
        form = "OWNER/NAME" if owned else "a name"
        raise ValueError(f"{argument} must be {form} of letters, digits, '-', '_' and '.' on the Hub, got {name!r}")


def is_hub_id(name: str | Path) -> bool:
    """Whether a name could be a repository on the Hub: `NAME` or `OWNER/NAME`."""
    try:
        validate_repo_id(str(name))
    except HFValidationError:
        return False
    return True
