"""Where videos and images come from: lists, folders and all that `datasets` loads, under one pair of columns."""

import glob
import hashlib
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tarfile import TarError
from typing import Any, TypeAlias

import pyarrow as pa
from datasets import (
    ClassLabel,
    Dataset,
    Features,
    Image,
    IterableDataset,
    List,
    Value,
    Video,
    config,
    get_dataset_split_names,
    load_dataset,
)
from datasets.data_files import get_data_patterns, resolve_pattern
from datasets.exceptions import DatasetGenerationError
from datasets.inspect import SplitsNotFoundError

from .class_labels import ClassLookup, Labels, as_value, labels_of_rows
from .files import is_image
from .folders import FileFinder, find_splits, find_tables, folder_rows
from .lists import CAPTION_COLUMNS, LIST_SUFFIXES, Row, Target, read_list
from .names import check_name, unreachable
from .output import writing
from .shards import BrokenSampleError, Shards

LIST_NAMES = {"train": ("train",), "validation": ("validation", "val"), "test": ("test",)}
ROWS_TOGETHER = 100_000
MAX_SHARDS = 64  # of a streamed list, for as many data workers
PLACES = ("__url__", "__key__")  # of a sample, in what `datasets` reads from shards
EVALUATION_SPLITS = ("validation", "test")
Split: TypeAlias = Dataset | IterableDataset


def load_split(
    data: str,
    split: str,
    *,
    data_root: Path | None = None,
    streaming: bool = False,
    target: Target | None = "label",
    regression: bool = False,
    label_names: list[str] | None = None,
    indices: bool = True,
) -> Split:
    r"""
    One split of videos or images, undecoded.

    Args:
        data (`str`):
            One of: a folder in the `videofolder` or `imagefolder` layout of `datasets` (`train/LABEL/*.mp4`, or files
            beside a `metadata.csv` with `file_name,label`); a folder with `train.csv`, `train.tsv`, `train.json` or
            `train.jsonl`, and the same for `val` and `test`, of `path,label` as in [`read_list`]; a folder of
            `webdataset` shards (`train-*.tar`, labels as `cls` or as `label` in `json`); the id of a data set on the
            Hub. Captions, one or a list, are a column `caption`, `captions`, `text` or `txt`, or in `json`.
        split (`str`): `"train"`, `"validation"` or `"test"`, or another split of a data set on the Hub.
        data_root (`Path`, *optional*):
            What the paths of a list are relative to, by default the folder of the list. Addresses (`https://...`) stay.
        streaming (`bool`, defaults to `False`): Whether to read shards as they come, without a copy on disk.
        target (`str`, *optional*, defaults to `"label"`):
            What is wanted of each example besides: `"label"`, `"captions"`, or nothing.
        regression (`bool`, defaults to `False`): Whether whole numbers are values to predict rather than classes.
        label_names (`list[str]`, *optional*):
            Names of the classes, in order. Without them they are those of the data set, else the labels found in it:
            whole numbers are indices from 0 to the largest, other labels are names, sorted. White space around a label
            doesn't count, and accents compare as composed (NFC).
        indices (`bool`, defaults to `True`):
            Whether a whole number that is not one of `label_names` is an index into them, as long as no name is a whole
            number.

    Returns:
        `Dataset` or `IterableDataset`: with a column `video` or `image` (a dictionary with `path` and `bytes`), and a
        column `label`, a `ClassLabel`, or floating point for regression; or `captions`, a list of texts.

    Raises:
        `FileNotFoundError`, `ValueError`: if there is no such data or split, it lacks a column, a line of a list can't
            be read, or a label is not one of `label_names`. The message names the file and the line.
    """
    name = f"split {split!r} of {data}"
    rows = _list_rows(data, split, target)
    root = Path(data_root or data)
    if rows is not None:
        rows = _with_files(rows, root)
    elif listed := _listed_splits(data):
        raise ValueError(f"{data} has no split {split}, it has {', '.join(listed)}.")
    elif data_root is not None:
        raise ValueError(f"`data_root` is for lists of files: {data} has no {split}.csv or {split}.jsonl.")
    elif splits := _folder_splits(data):
        if split not in splits:
            raise ValueError(f"{data} has no split {split}, it has {', '.join(splits)}.")
        rows = folder_rows(Path(data), splits[split], target)
    if rows is not None:
        loaded = _dataset_of_rows(rows, name, target, Labels(regression, label_names, indices))
        return loaded.to_iterable_dataset(num_shards=min(len(loaded), MAX_SHARDS)) if streaming else loaded
    loaded = _with_media(_known(_load_dataset(data, split, streaming)), name)
    if target == "label":
        return _with_labels(loaded, name, Labels(regression, label_names, indices))
    if target == "captions":
        loaded = _with_captions(loaded, name)
    return loaded.select_columns([media_kind(loaded), *([target] if target else [])])


def find_evaluation_split(data: str) -> str:
    """The split to evaluate on: `"validation"`, else `"test"`. Raises `ValueError` where there is neither."""
    names = split_names(data)
    for name in EVALUATION_SPLITS:
        if name in names:
            return name
    raise ValueError(f"{data} must have a split validation or test, got {', '.join(names)}.")


def split_names(data: str) -> list[str]:
    """The splits that there are."""
    if listed := _listed_splits(data):
        return listed
    if splits := _folder_splits(data):
        return list(splits)
    if (files := _shards(data)) is not None:
        return list(files)
    try:
        with _named(data):
            return get_dataset_split_names(data)
    except SplitsNotFoundError as error:
        raise ValueError(f"{data}: {' '.join(str(error.__cause__ or error).split())}") from error


@contextmanager
def _named(data: str) -> Iterator[None]:
    """Raises `OSError` that says what is wrong where there is neither a folder nor a data set of this name."""
    check_name(data, "dataset")
    try:
        yield
    except ConnectionError as error:
        raise unreachable(data) from error


def media_kind(split: Split) -> str:
    """`"video"` or `"image"`, which is also the name of the column."""
    return "video" if "video" in split.features else "image"


# Lists and folders


def _listed_splits(data: str) -> list[str]:
    return [split for split in LIST_NAMES if _lists(data, split)]


def _lists(data: str, split: str) -> list[Path]:
    """The lists of a split, whatever the case of their names."""
    names = [name.casefold() for name in LIST_NAMES.get(split, (split,))]
    files = sorted(Path(data).iterdir()) if Path(data).is_dir() else []
    return [
        file
        for file in files
        if file.stem.casefold() in names and file.suffix.lower() in LIST_SUFFIXES and file.is_file()
    ]


def _list_rows(data: str, split: str, target: Target | None) -> list[Row] | None:
    """The rows of the list of a split, if there is one."""
    paths = _lists(data, split)
    if len(paths) > 1:
        raise ValueError(f"Split {split!r} must be one list of files, got {', '.join(map(str, paths))}.")
    return read_list(paths[0], target) if paths else None


def _with_files(rows: list[Row], root: Path) -> list[Row]:
    find = FileFinder(root)
    paths = (row.path if "://" in row.path else str(find(row.path, row.where)) for row in rows)
    return [Row(row.where, path, row.value) for row, path in zip(rows, paths, strict=True)]


def _folder_splits(data: str) -> dict[str, list[Path]]:
    return find_splits(Path(data)) if Path(data).is_dir() else {}


def _dataset_of_rows(rows: list[Row], name: str, target: Target | None, labels: Labels) -> Dataset:
    kinds = ["image" if is_image(row.path) else "video" for row in rows]
    if len(set(kinds)) > 1:
        first = next(row for row, kind in zip(rows, kinds, strict=True) if kind != kinds[0])
        raise ValueError(f"{first.where}: {first.path} is no {kinds[0]}, as {rows[0].path} is: a split has one kind.")
    columns: dict[str, list[Any]] = {kinds[0]: [{"path": row.path, "bytes": None} for row in rows]}
    features = Features({kinds[0]: Video(decode=False) if kinds[0] == "video" else Image(decode=False)})
    if target == "label":
        columns["label"], names = labels_of_rows(rows, name, labels)
        features["label"] = Value("float32") if names is None else ClassLabel(names=names)
    elif target == "captions":
        columns["captions"] = [row.value for row in rows]
        features["captions"] = List(Value("string"))
    return _on_disk(columns, features)


def _on_disk(columns: dict[str, list[Any]], features: Features) -> Dataset:
    """
    A table in the cache of `datasets`, by its content, because each data worker would have a copy in memory. Raises
    [`WriteError`] where the disk refuses.
    """
    folder = Path(config.HF_DATASETS_CACHE) / "lists"
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        return Dataset.from_file(str(_write_table(folder, columns, features.arrow_schema)))


def _write_table(folder: Path, columns: dict[str, list[Any]], schema: pa.Schema) -> Path:
    """A file with the name of its content."""
    unfinished = folder / f"{uuid.uuid4().hex}.writing"
    digest = hashlib.sha256()
    with unfinished.open("wb") as file, pa.ipc.new_stream(file, schema) as stream:
        for start in range(0, len(next(iter(columns.values()))), ROWS_TOGETHER):
            parts = (values[start : start + ROWS_TOGETHER] for values in columns.values())
            arrays = [pa.array(part, field.type) for part, field in zip(parts, schema, strict=True)]
            batch = pa.record_batch(arrays, schema=schema)
            digest.update(batch.serialize())
            stream.write_batch(batch)
    digest.update(schema.serialize())
    path = folder / f"{digest.hexdigest()}.arrow"
    unfinished.replace(path)
    return path


# What `datasets` loads


def _load_dataset(data: str, split: str, streaming: bool) -> Split:
    files = _shards(data)
    try:
        if files is None:
            with _named(data):
                return load_dataset(data, split=split, streaming=streaming)
        if split not in files:
            raise ValueError(f"{data} has no split {split}, it has {', '.join(files)}.")
        builder = Shards(data_files={split: files[split]})
        if streaming:
            return builder.as_streaming_dataset(split)
        builder.download_and_prepare()
        return builder.as_dataset(split)
    except (DatasetGenerationError, pa.ArrowException, TarError) as error:
        reason = error.__cause__ or error
        raise ValueError(f"{data}: split {split!r} can't be read: {' '.join(str(reason).split())}") from error


def _shards(data: str) -> dict[str, list[str]] | None:
    """
    The shards of each split of a folder, escaped because `datasets` takes names for patterns. `None` for all that
    `datasets` finds itself: other files, and a folder that has a README.md, which may say what is in which split.
    """
    folder, base = Path(data), glob.escape(data)
    if not folder.is_dir():
        return None
    tables = [str(path) for path in find_tables(folder)]
    has_shards = bool(tables) and all(map(_is_shard, tables))
    if base == data and (not has_shards or (folder / "README.md").exists()):
        return None
    found = {str(split): _resolved(patterns, base) for split, patterns in get_data_patterns(base).items()}
    if not has_shards:
        other = next(path for paths in found.values() for path in paths if not _is_shard(path))
        raise ValueError(f"{data} has characters of patterns in its name, which is only for tar shards: {other}")
    known = {Path(path).resolve() for paths in found.values() for path in paths}
    if left := next((path for path in tables if Path(path).resolve() not in known), None):
        raise ValueError(f"{left} is in no split, and others are ({', '.join(found)}): call it train-0.tar, say.")
    return {split: [glob.escape(path) for path in paths if _is_shard(path)] for split, paths in found.items()}


def _is_shard(path: str) -> bool:
    return path.lower().endswith(".tar")


def _resolved(patterns: Iterable[str], base: str) -> list[str]:
    found: set[str] = set()
    for pattern in patterns:
        try:
            found.update(resolve_pattern(pattern, base))
        except FileNotFoundError:
            continue
    return sorted(found)


def _known(split: Split) -> Split:
    """A stream learns the types of its columns from its first example."""
    return split if split.features is not None else split._resolve_features()


def _with_media(split: Split, name: str) -> Split:
    """With the column `video` or `image`, undecoded."""
    features = split.features
    column = next((key for key, feature in features.items() if isinstance(feature, Video | Image)), None)
    if column is None:
        raise ValueError(f"The {name} must have a column of videos or images, got {', '.join(features)}.")
    kind = "image" if isinstance(features[column], Image) else "video"
    split = split.cast_column(column, Video(decode=False) if kind == "video" else Image(decode=False))
    return split if column == kind else split.rename_column(column, kind)  # which would decode it, if it came first


def _with_captions(split: Split, name: str) -> Split:
    """With the column `captions`, lists of texts."""
    column = next((column for column in CAPTION_COLUMNS if column in split.features), None)
    field = None
    if column is None and "json" in split.features:
        field = next((column for column in CAPTION_COLUMNS if column in split.features["json"]), None)
        column = "json"
    if column is None or (column == "json" and field is None):
        known = ", ".join(f"`{column}`" for column in CAPTION_COLUMNS)
        raise ValueError(f"The {name} must have one of the columns {known}, got {', '.join(split.features)}.")
    kind = media_kind(split)
    features = split.features.copy()
    features = type(features)({kind: features[kind], "captions": List(Value("string"))})
    options = {"column": column, "field": field}
    others = [other for other in split.features if other != kind]
    return split.map(_captions_of, fn_kwargs=options, remove_columns=others, features=features)


def _captions_of(example: dict[str, Any], column: str, field: str | None) -> dict[str, Any]:
    value = example[column] if field is None else example[column][field]
    return {"captions": value if isinstance(value, list) else [] if value is None else [value]}


def _label_in_json(example: dict[str, Any], name: str) -> dict[str, Any]:
    found = example["json"]
    if not isinstance(found, dict) or "label" not in found:
        got = ", ".join(found) if isinstance(found, dict) else found
        raise BrokenSampleError(f"{_place(example, name, '.json')}: must have `label`, got {got}")
    return {"label": found["label"]}


def _with_labels(split: Split, name: str, labels: Labels) -> Split:
    """With the column `label` as class indices with names, or as numbers to predict."""
    if "label" not in split.features and "cls" in split.features:
        split = split.rename_column("cls", "label")
    elif "label" not in split.features and "json" in split.features:
        split = _known(split.map(_label_in_json, fn_kwargs={"name": name}, remove_columns="json"))
    if "label" not in split.features:
        raise ValueError(f"The {name} must have a column `label`, got {', '.join(split.features)}.")
    places = [column for column in PLACES if column in split.features]
    split = split.select_columns([media_kind(split), "label", *places])
    feature = split.features["label"]
    names = feature.names if isinstance(feature, ClassLabel) else None
    dtype = getattr(feature, "dtype", str(feature))
    features = type(split.features)({key: split.features[key] for key in (media_kind(split), "label")})
    if labels.regression or dtype.startswith("float"):
        if names is not None or not dtype.startswith(("float", "int")):
            raise ValueError(f"The labels of the {name} must be numbers for regression, got {feature}.")
        features["label"] = Value("float32")
        return split.map(_as_number, fn_kwargs={"name": name}, remove_columns=places, features=features)
    if names is None and not dtype.endswith("string") and not dtype.startswith(("int", "uint")):
        raise ValueError(f"The labels of the {name} must be text or numbers, got {feature}.")
    label_names = labels.names
    if label_names is None:
        label_names = names or _found_names(split, name, dtype)
    if names == label_names:
        return split.select_columns(list(features))
    features["label"] = ClassLabel(names=label_names)
    options = {"names": names, "lookup": ClassLookup(label_names, labels.indices), "name": name}
    return split.map(_numbered, fn_kwargs=options, remove_columns=places, features=features)


def _found_names(split: Split, name: str, dtype: str) -> list[str]:
    if not isinstance(split, Dataset):
        raise ValueError(f"The {name} is streamed and its labels have no names: pass `label_names`.")
    known = split.select_columns([column for column in ("label", *PLACES) if column in split.features])
    first = {label: index for index, label in reversed(list(enumerate(known["label"])))}
    rows = [
        Row(_place(known[index], name), "", label) for label, index in sorted(first.items(), key=lambda item: item[1])
    ]
    return labels_of_rows(rows, name, Labels())[1] or []


def _as_number(example: dict[str, Any], name: str) -> dict[str, Any]:
    label = example["label"]
    if label is None or label != label:
        raise BrokenSampleError(f"{_place(example, name)}: the label must be a number, got {label}.")
    try:
        return {"label": as_value(label, _place(example, name))}
    except ValueError as error:
        raise BrokenSampleError(str(error)) from error


def _numbered(example: dict[str, Any], names: list[str] | None, lookup: ClassLookup, name: str) -> dict[str, Any]:
    label = example["label"]
    if names is not None and label is not None:
        label = names[label] if label >= 0 else None  # as data sets without labels have it
    try:
        return {"label": lookup(label, _place(example, name))}
    except ValueError as error:  # known by its class where a stream is read by a worker
        raise BrokenSampleError(str(error)) from error


def _place(example: dict[str, Any], name: str, suffix: str = "") -> str:
    """Where an example is: the sample of a shard or, of other data, what is known of it."""
    if all(example.get(column) for column in PLACES):
        shard, sample = (example[column] for column in PLACES)
        return f"shard {shard}, {sample}{suffix}"
    media = next((example[kind]["path"] for kind in ("video", "image") if kind in example), None)
    return f"The {name}" if media is None else f"{media} in the {name}"
