"""Publishing models on the Hub, as push_to_hub.py does."""

import argparse
import logging
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import HTTPError, LocalTokenNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile
from transformers.utils.logging import disable_progress_bar

import modeling_videomamba
from model_zoo import ZooModel, find_by_filename, load_zoo, make_card
from modeling_videomamba import (
    VideoMambaForImageClassification,
    VideoMambaForMaskedPreTraining,
    VideoMambaForVideoClassification,
    VideoMambaForVideoTextRetrieval,
)
from modeling_videomamba.training.cards import CARD, check_card, without_signatures
from modeling_videomamba.training.names import check_hub_id
from staging import Publishable, StagedFile, load_source, stage

CLASSES: dict[str, type] = {
    "image-classification": VideoMambaForImageClassification,
    "video-classification": VideoMambaForVideoClassification,
    "masked-pretraining": VideoMambaForMaskedPreTraining,
    "video-text-retrieval": VideoMambaForVideoTextRetrieval,
}
MODEL_NAME = re.compile(r'(?:from_pretrained\(|model=|name = )"([^"]+)"')
WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json")
PROCESSORS = {"preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json"}
CODE = {path.name for path in Path(modeling_videomamba.__file__).parent.glob("*.py")}


# One model


def publish(args: argparse.Namespace, source: Path, repo_id: str, entry: ZooModel | None) -> str:
    """Stages and uploads a model; what was done, in a line. Raises `OSError` or `ValueError` with what is wrong."""
    loaded = load_source(source, args.labels or (entry.labels if entry else None), args.tokenizer)
    if entry is not None:
        check_entry(entry, loaded)
    card = find_card(args, source, repo_id, entry)
    with staging_folder(args, repo_id) as folder:
        files = stage(loaded, card, folder, args.max_shard_size)
        print_files(repo_id, files)
        if args.dry_run:
            return f"{repo_id}: staged in {folder}, nothing is published"
        return upload(args, folder, files, repo_id, f"Upload {type(loaded.model).__name__} from {source.name}")


@contextmanager
def staging_folder(args: argparse.Namespace, repo_id: str) -> Iterator[Path]:
    """That of a dry run, or one that doesn't stay."""
    if args.dry_run:
        yield hidden_from_git(args.folder) / repo_id.split("/")[-1]
        return
    with tempfile.TemporaryDirectory() as temporary:
        yield Path(temporary)


def hidden_from_git(folder: Path) -> Path:
    """The folder, in which git sees nothing: it is made with a list of what git is to ignore, all."""
    if not folder.exists():
        folder.mkdir(parents=True)
        (folder / ".gitignore").write_text("*\n", "utf-8")
    return folder


def find_card(args: argparse.Namespace, source: Path, repo_id: str, entry: ZooModel | None) -> ModelCard:
    """That of --card, of the zoo or of the directory. Raises `ValueError` where there is none."""
    if args.card is not None:
        return ModelCard.load(args.card)
    if entry is not None:
        dataset = replace(entry.dataset, has_labels=entry.dataset.has_labels or args.labels is not None)
        return make_card(replace(entry, dataset=dataset), repo_id)
    if (source / CARD).is_file():
        return rename_model(ModelCard.load(source / CARD), repo_id)
    raise ValueError(f"{source} has no {CARD}, and is not in the zoo: pass --card")


def rename_model(card: ModelCard, repo_id: str) -> ModelCard:
    """A card whose code loads the model from where it is published, and not from where it was trained."""
    names = set(MODEL_NAME.findall(card.text))
    if len(names) > 1:
        raise ValueError(f"the code in {CARD} loads {', '.join(sorted(names))}: only one can become {repo_id}, edit it")
    for name in names:
        card.text = card.text.replace(f'"{name}"', f'"{repo_id}"')
    if card.data.eval_results:
        card.data.model_name = repo_id
    return card


def check_entry(entry: ZooModel, loaded: Publishable) -> None:
    """Raises `ValueError` where a checkpoint isn't what the zoo says of the file of this name."""
    config = loaded.model.config
    vision = getattr(config, "vision_config", config)
    found = {
        "hidden_size": vision.hidden_size,
        "num_hidden_layers": vision.num_hidden_layers,
        "resolution": vision.input_size[0],
        "frames": vision.num_frames,
    }
    expected = {name: getattr(entry, name) for name in found}
    found["class"], expected["class"] = type(loaded.model).__name__, CLASSES[entry.family].__name__
    if "classification" in entry.family:
        found["classes"], expected["classes"] = config.num_labels, entry.dataset.num_classes
    if wrong := [
        f"{name} {found[name]} instead of {expected[name]}" for name in found if found[name] != expected[name]
    ]:
        raise ValueError(f"{entry.filename} is not what the zoo has under this name: {', '.join(wrong)}")


def print_files(repo_id: str, files: list[StagedFile]) -> None:
    print(f"{repo_id}: {len(files)} files, {sum(file.size for file in files):,} bytes")
    for file in files:
        print(f"  {file.sha256}  {file.size:>13,}  {file.path}")


# The Hub


def check_login() -> None:
    """Raises `OSError` where nobody is logged in, before anything is computed."""
    try:
        HfApi().whoami()
    except LocalTokenNotFoundError as error:
        raise OSError("nobody is logged in: run `hf auth login`") from error


def upload(args: argparse.Namespace, folder: Path, files: list[StagedFile], repo_id: str, message: str) -> str:
    """One commit of what differs from the repository, which is made if there is none; none without a difference."""
    api = HfApi()
    api.create_repo(repo_id, private=args.private or None, exist_ok=True)
    if args.private and not api.model_info(repo_id).private:
        raise ValueError(f"--private: {repo_id} is public")
    try:
        before = api.model_info(repo_id, revision=args.revision)
    except RevisionNotFoundError:
        api.create_branch(repo_id, branch=args.revision)
        before = api.model_info(repo_id, revision=args.revision)
    if not (args.overwrite_card or args.pull_request):  # a pull request is read before it overwrites anything
        try:
            check_card(api, repo_id, (folder / CARD).read_text("utf-8"), before.sha)
        except ValueError as error:
            raise ValueError(f"{error}: take over what it says with --card, or pass --overwrite-card") from None
    names = {file.path for file in files}
    there = [sibling.rfilename for sibling in before.siblings or []]
    stale = [name for name in there if is_ours(name) and name not in names]
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        *(CommitOperationAdd(file.path, folder / file.path) for file in files),
        *(CommitOperationDelete(name) for name in stale),
    ]
    if stale:
        print(f"{repo_id}: removes {', '.join(stale)}, which the model no longer has")
    if args.pull_request and (opened := find_pull_request(api, repo_id, files, stale)):
        return f"{repo_id}: unchanged since {opened}, no commit"
    try:
        commit = api.create_commit(
            repo_id,
            operations,
            commit_message=message,
            revision=args.revision,
            create_pr=args.pull_request,
            parent_commit=before.sha,  # the Hub refuses it if the card was edited since
        )
    except RuntimeError as error:  # of the upload of one file, with its reason
        raise OSError(f"{error} {error.__cause__ or ''}") from error
    if commit.oid == before.sha:
        return f"{repo_id}: unchanged, no commit"
    return f"{repo_id}: {commit.pr_url or commit.commit_url}"


def is_ours(path: str) -> bool:
    """Whether a file of a repository is one of those that a model consists of here, whoever put it there."""
    return path in CODE | PROCESSORS or WEIGHTS.fullmatch(path) is not None


def find_pull_request(api: HfApi, repo_id: str, files: list[StagedFile], stale: list[str]) -> str | None:
    """An open pull request that has all these files as they are, and none of the stale ones."""
    for one in api.get_repo_discussions(repo_id, discussion_type="pull_request", discussion_status="open"):
        there = {
            file.path: file.lfs.sha256 if file.lfs else file.blob_id
            for file in api.list_repo_tree(repo_id, revision=one.git_reference, recursive=True)
            if isinstance(file, RepoFile)
        }
        same = all(there.get(file.path) in (file.sha256, file.git_oid) for file in files)
        if same and there.keys().isdisjoint(stale):
            return one.url
    return None


class WithoutSignatures(logging.Filter):
    """The client logs addresses of uploads that it tries again, which give access."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = without_signatures(record.getMessage()), ()
        return True


# The zoo


def publish_all(args: argparse.Namespace) -> None:
    """Publishes what is there; tells what isn't, and ends with an error if something failed or there is nothing."""
    if not args.source.is_dir():
        sys.exit(f"error: {args.source}: no such folder")
    failed, left = [], {path.name for path in args.source.glob("*.pth")}
    unknown, published = set(left), 0
    for entry in load_zoo():
        if entry.filename is None:
            print(f"left out: {entry.name}, which the source lists under the name of another file")
        elif entry.filename not in left:
            print(f"left out: {entry.name}, there is no {entry.filename}")
        else:
            unknown.discard(entry.filename)
            try:
                print(publish(args, args.source / entry.filename, f"{args.repo_id}/{entry.name}", entry))
                published += 1
            except (OSError, ValueError, HTTPError) as error:
                failed.append(entry.name)
                print(f"failed: {entry.name}: {without_signatures(str(error))}", file=sys.stderr)
    for name in sorted(unknown):
        print(f"left out: {name}, which is not in the zoo")
    if failed or not published:
        sys.exit(f"error: {published} models, {len(failed)} failed{': ' if failed else ''}{', '.join(failed)}")


def run(args: argparse.Namespace) -> None:
    """What push_to_hub.py does; what is wrong ends the process with a message."""
    disable_progress_bar()
    logging.getLogger("huggingface_hub.utils._http").addFilter(WithoutSignatures())
    try:
        check_hub_id("ORG of --all" if args.all else "ORG/NAME", args.repo_id, owned=not args.all)
        if not args.dry_run:
            check_login()
        if args.all:
            publish_all(args)
            return
        entry = None if args.source.is_dir() else find_by_filename(args.source.name)
        print(publish(args, args.source, args.repo_id, entry))
    except (OSError, ValueError, HTTPError) as error:  # the latter of a connection
        sys.exit(f"error: {without_signatures(str(error))}")
