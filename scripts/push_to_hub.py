"""Publishes a model on the Hub: converts it, checks that it still says the same, and uploads it in one commit.

    python scripts/push_to_hub.py videomamba_t16_k400_f8_res224.pth ORG/videomamba-ti-k400-f8-224 --dry-run
    python scripts/push_to_hub.py OUTPUT/best ORG/my-videomamba --private
    python scripts/push_to_hub.py --all CHECKPOINTS ORG

The model is a .pth file of the original release, or a directory from training or convert_checkpoint.py (which takes
what is not standard of a .pth file). Released checkpoints get the cards of the zoo, directories keep their README.md.
--all publishes every released checkpoint in a folder. Log in with `hf auth login`. A run that failed is started again:
what has been uploaded is not uploaded again, and without changes there is no commit.
"""

import argparse
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import filter_repo_objects, validate_repo_id
from transformers.utils import logging

from model_zoo import ZooModel, find_by_filename, load_zoo, make_card
from staging import CARD, Publishable, StagedFile, load_source, stage

DRY_RUN_FOLDER = Path("staged")
TOKENIZER = "google-bert/bert-base-uncased"  # of all released models of videos and texts
OURS = ["*.safetensors", "*.safetensors.index.json", "*.py"]  # removed where they are no longer part of the model


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "source", type=Path, metavar="MODEL", help=".pth file or directory; with --all a folder of them"
    )
    parser.add_argument("repo_id", metavar="ORG/NAME", help="where it is published; with --all an organisation")
    parser.add_argument("--all", action="store_true", help="all released checkpoints that are in the folder")
    parser.add_argument(
        "--dry-run",
        type=Path,
        nargs="?",
        const=DRY_RUN_FOLDER,
        metavar="DIR",
        help=f"leave in DIR/NAME what would be published, and publish nothing (DIR: {DRY_RUN_FOLDER})",
    )
    parser.add_argument("--private", action="store_true", help="make a private repository")
    parser.add_argument("--revision", metavar="BRANCH", help="commit to this branch")
    parser.add_argument("--pull-request", action="store_true", help="commit to a new pull request")
    parser.add_argument("--labels", help="class names of a .pth file: a file, or a known data set")
    parser.add_argument("--tokenizer", default=TOKENIZER, help=f"of a .pth file of videos and texts ({TOKENIZER})")
    parser.add_argument("--card", type=Path, help="README.md of a model that has none")
    parser.add_argument("--max-shard-size", default="5GB", help="of a file of weights (default: 5GB)")
    args = parser.parse_args()
    if args.revision is not None and args.pull_request:
        parser.error(f"--revision {args.revision} and --pull-request exclude each other")
    if args.all and (args.labels is not None or args.card is not None):
        parser.error("--labels and --card are for one model, not for --all")
    return args


# One model


def publish(args: argparse.Namespace, source: Path, repo_id: str, entry: ZooModel | None) -> str:
    """Stages and uploads a model; what was done, in a line. Raises `OSError` or `ValueError` with what is wrong."""
    if args.dry_run is None:
        check_login()
    loaded = load_source(source, args.labels or (entry.labels if entry else None), args.tokenizer)
    if entry is not None:
        check_entry(entry, loaded)
    card = find_card(args, source, repo_id, entry)
    with staging_folder(args, repo_id) as folder:
        files = stage(loaded, card, folder, args.max_shard_size)
        print_files(repo_id, files)
        if args.dry_run is not None:
            return f"{repo_id}: staged in {folder}, nothing is published"
        return upload(args, folder, files, repo_id, f"Upload {type(loaded.model).__name__} from {source.name}")


@contextmanager
def staging_folder(args: argparse.Namespace, repo_id: str) -> Iterator[Path]:
    """That of a dry run, or one that doesn't stay."""
    if args.dry_run is not None:
        yield args.dry_run / repo_id.split("/")[-1]
        return
    with tempfile.TemporaryDirectory() as temporary:
        yield Path(temporary)


def find_card(args: argparse.Namespace, source: Path, repo_id: str, entry: ZooModel | None) -> ModelCard:
    """That of --card, of the zoo or of the directory. Raises `ValueError` where there is none."""
    if args.card is not None:
        return ModelCard.load(args.card)
    if entry is not None:
        return make_card(entry, repo_id)
    if (source / CARD).is_file():
        return ModelCard.load(source / CARD)
    raise ValueError(f"{source} has no {CARD}, and is not in the zoo: pass --card")


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
    if args.revision is not None:
        api.create_branch(repo_id, branch=args.revision, exist_ok=True)
    before = api.model_info(repo_id, revision=args.revision)
    names = {file.path for file in files}
    there = [sibling.rfilename for sibling in before.siblings or []]
    stale = [name for name in filter_repo_objects(there, allow_patterns=OURS) if name not in names]
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        *(CommitOperationAdd(file.path, folder / file.path) for file in files),
        *(CommitOperationDelete(name) for name in stale),
    ]
    try:
        commit = api.create_commit(
            repo_id, operations, commit_message=message, revision=args.revision, create_pr=args.pull_request
        )
    except RuntimeError as error:  # of the upload of one file, with its reason
        raise OSError(f"{error} {error.__cause__ or ''}") from error
    if commit.oid == before.sha:
        return f"{repo_id}: unchanged, no commit"
    return f"{repo_id}: {commit.pr_url or commit.commit_url}"


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
            except (OSError, ValueError) as error:
                failed.append(entry.name)
                print(f"failed: {entry.name}: {reason(error)}", file=sys.stderr)
    for name in sorted(unknown):
        print(f"left out: {name}, which is not in the zoo")
    if failed or not published:
        sys.exit(f"error: {published} models, {len(failed)} failed{': ' if failed else ''}{', '.join(failed)}")


def reason(error: Exception) -> str:
    """What an error says, without the parts of addresses that may give access."""
    return re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]*", r"\1", str(error))


def main() -> None:
    args = parse_args()
    logging.disable_progress_bar()
    try:
        validate_repo_id(args.repo_id)
        if args.all:
            publish_all(args)
            return
        if args.repo_id.count("/") != 1:
            raise ValueError(f"the repository must be ORG/NAME, got {args.repo_id}")
        entry = None if args.source.is_dir() else find_by_filename(args.source.name)
        print(publish(args, args.source, args.repo_id, entry))
    except (OSError, ValueError, HFValidationError) as error:
        sys.exit(f"error: {reason(error)}")


if __name__ == "__main__":
    main()
