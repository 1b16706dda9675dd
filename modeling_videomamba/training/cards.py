"""What may be published: words without folders and secrets, files of a model, and cards that replace no edited ones."""

import hashlib
import os
import re
import shlex
from pathlib import Path
from urllib.parse import unquote

from huggingface_hub import HfApi
from huggingface_hub.errors import RemoteEntryNotFoundError, RevisionNotFoundError

from .names import is_hub_id

CARD = "README.md"
HIDDEN = "***"
ADDRESS = re.compile(r"([a-zA-Z][\w+.-]*)://(\S*)")
HOST = re.compile(r"([\w.-]+|\[[\da-fA-F:]+\])(:\d+)?")
HUB = "huggingface.co"
# whose addresses give no access by themselves; the path of another address may
STORES = {"s3", "gs", "gcs", "az", "abfs", "abfss", "hdfs", "hf"}
HOMES = {"home", "users"}
# of the Hub, of GitHub and GitLab, of AWS, of Slack, of OpenAI and others
TOKEN = re.compile(
    r"\b(?:hf|api_org)_\w+"
    r"|(?<![a-zA-Z\d])(?:(?:gh[oprsu]|github_pat)_\w+|glpat-[\w-]+|A[KS]IA[A-Z\d]{12,}|xox[a-z]-[\w-]+|sk-[\w-]{20,})"
)
SECRET = re.compile(r"(?i)((?:token|secret|password|signature|sig|credential|key)=)[^&\s]+")
SEAL = re.compile(r"\s*<!-- published by push_to_hub.py; SHA-256 of the text above: ([0-9a-f]{64}) -->\s*\Z")


def reason_to_keep(path: Path) -> str | None:
    """Why a file in the folder of a model is not published, `None` if it is."""
    if path.name.startswith("."):
        return "a hidden file"
    if path.is_symlink():  # to any file of this machine
        return f"a symbolic link to {path.readlink()}"
    return None if path.is_file() else "which is no file"


# Words


def public_command(words: list[str]) -> str:
    """A command line without folders, without what gives access in addresses, and without tokens."""
    return shlex.join(public_word(word) for word in words)


def public_word(word: str) -> str:
    """A word of a command line: an option, `option=value` or a value."""
    option, equals, value = word.partition("=") if word.startswith("-") and "=" in word else ("", "", word)
    while (plain := unquote(value)) != value:  # an escaped signature gives access too
        value = plain
    shown = option + equals + _public_value(value)
    return SECRET.sub(rf"\1{HIDDEN}", TOKEN.sub(HIDDEN, shown))


def public_name(word: str) -> str:
    """The last part of a path, an address or a Hub id."""
    return public_word(word).rsplit("/", 1)[-1]


def is_on_hub(word: str) -> bool:
    """Whether a word can name a model or a data set on the Hub, and names nothing here."""
    return is_hub_id(word) and not Path(word).exists()


def _public_value(value: str) -> str:
    if "://" in value:
        return _public_address(value)
    if is_on_hub(value):
        return value
    *folders, last = re.split(r"[/\\]+", value.rstrip("/\\"))
    if re.search(r"[?#]", "/".join(folders)) or _is_home(folders, last):  # `last` may be the end of a signature
        return HIDDEN
    return re.split(r"[?#]", last)[0].rsplit("@", 1)[-1]


def _is_home(folders: list[str], last: str) -> bool:
    """Whether the last part of a path is the name of a user."""
    is_inside = bool(folders) and folders[-1].rsplit(":", 1)[-1].lower() in HOMES
    own = Path(os.path.expanduser("~")).name  # noqa: PTH111 - `Path.home` raises an error where there is none
    return is_inside or re.search(r"(^|:)~.", last) is not None or (own != "" and last == own)


def _public_address(value: str) -> str:
    match = ADDRESS.fullmatch(value)
    if match is None or value.count("://") > 1:
        return HIDDEN
    scheme, rest = match.groups()
    if scheme.lower() == "file":
        return _public_value(rest)
    login, _, place = rest.rpartition("@")
    host, slash, path = re.split(r"[?#;&]", place)[0].partition("/")
    is_store = scheme.lower() in STORES
    if HOST.fullmatch(host) is None or re.search(r"[?#;&]" if is_store else r"[?#;&/]", login):
        return f"{scheme}://{HIDDEN}"
    return f"{scheme}://{host}{slash}{path}" if is_store or host == HUB else f"{scheme}://{host}"


def without_signatures(text: str) -> str:
    """A message without the parts of addresses that give access."""
    return re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]*", r"\1", text)


# Cards


def seal(text: str) -> str:
    """The text of a card with its checksum in a comment, by which [`was_edited`] sees that it was not edited."""
    text = _unsealed(text)
    return f"{text}\n\n<!-- published by push_to_hub.py; SHA-256 of the text above: {_digest(text)} -->\n"


def was_edited(published: str, text: str) -> bool:
    """Whether a published card was not sealed by [`seal`] or changed since, and differs from `text`, the new one."""
    match = SEAL.search(published)
    is_ours = match is not None and match[1] == _digest(_unsealed(published))
    return not is_ours and _unsealed(published) != _unsealed(text)


def _unsealed(text: str) -> str:
    return SEAL.sub("", text.replace("\r\n", "\n")).rstrip()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def check_card(api: HfApi, repo_id: str, text: str, revision: str | None = None) -> None:
    """
    Raises `ValueError` if `text` would overwrite a card that was written or edited in another way than by [`seal`], and
    `OSError` if the Hub can't be asked.
    """
    try:
        published = Path(api.hf_hub_download(repo_id, CARD, revision=revision)).read_text("utf-8", "replace")
    except (RemoteEntryNotFoundError, RevisionNotFoundError):
        return
    if was_edited(published, text):
        raise ValueError(f"{CARD} of {repo_id} was edited, or not written by push_to_hub.py, and would be overwritten")
