"""Where videos and images come from: everything that `datasets` loads, under one pair of columns."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeAlias

from datasets import (
    ClassLabel,
    Dataset,
    Image,
    IterableDataset,
    List,
    Value,
    Video,
    get_dataset_split_names,
    load_dataset,
)
from PIL import Image as PILImage

from .names import check_name, unreachable

LIST_BUILDERS = {".csv": "csv", ".jsonl": "json", ".json": "json"}
LIST_NAMES = {"train": ("train",), "validation": ("validation", "val"), "test": ("test",)}
EVALUATION_SPLITS = ("validation", "test")
PATH_COLUMNS = ("path", "video", "image")  # the latter in the lists of the original release
CAPTION_COLUMNS = ("captions", "caption", "text", "txt")
Split: TypeAlias = Dataset | IterableDataset
Target = Literal["label", "captions"]


def load_split(
    data: str,
    split: str,
    *,
    data_root: Path | None = None,
    streaming: bool = False,
    target: Target | None = "label",
    regression: bool = False,
    label_names: list[str] | None = None,
) -> Split:
    r"""
    One split of videos or images, undecoded.

    Args:
        data (`str`):
            One of: a folder in the `videofolder` or `imagefolder` layout of `datasets` (`train/LABEL/*.mp4`, or files
            beside a `metadata.csv` with `file_name,label`); a folder with `train.csv`, `train.json` or `train.jsonl`,
            and the same for `val` and `test`, of `path,label`; a folder of `webdataset` shards (`train-*.tar`, labels
            as `cls` or as `label` in `json`); the id of a data set on the Hub. Captions, one or a list, are a column
            `caption`, `captions`, `text` or `txt`, or in `json`.
        split (`str`): `"train"`, `"validation"` or `"test"`, or another split of a data set on the Hub.
        data_root (`Path`, *optional*):
            What the paths of a list are relative to, by default the folder of the list. Addresses (`https://...`) stay.
        streaming (`bool`, defaults to `False`): Whether to read shards as they come, without a copy on disk.
        target (`str`, *optional*, defaults to `"label"`):
            What is wanted of each example besides: `"label"`, `"captions"`, or nothing.
        regression (`bool`, defaults to `False`): Whether whole numbers are values to predict rather than classes.
        label_names (`list[str]`, *optional*):
            Names of the classes, in order. Without them they are those of the data set, else the labels found in it.

    Returns:
        `Dataset` or `IterableDataset`: with a column `video` or `image` (a dictionary with `path` and `bytes`), and a
        column `label`, a `ClassLabel`, or floating point for regression; or `captions`, a list of texts.

    Raises:
        `FileNotFoundError`, `ValueError`: if there is no such data or split, it lacks a column, or a label is not one
            of `label_names`.
    """
    name = f"split {split!r} of {data}"
    lists = _lists(data, split)
    if lists:
        loaded = _load_list(lists, split, streaming, str(data_root or data), target)
    elif data_root is not None:
        raise ValueError(f"`data_root` is for lists of files: {data} has no {split}.csv or {split}.jsonl.")
    else:
        with _named(data):
            loaded = _known(load_dataset(data, split=split, streaming=streaming))
    loaded = _with_media(loaded, name)
    if target == "label":
        return _with_labels(loaded, name, regression, label_names)
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
    if found := [split for split in LIST_NAMES if _lists(data, split)]:
        return found
    with _named(data):
        return get_dataset_split_names(data)


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


def _lists(data: str, split: str) -> list[Path]:
    names = [f"{name}{suffix}" for name in LIST_NAMES.get(split, (split,)) for suffix in LIST_BUILDERS]
    return [path for name in names if (path := Path(data) / name).is_file()]


def _load_list(paths: list[Path], split: str, streaming: bool, root: str, target: Target | None) -> Split:
    if len(paths) > 1:
        raise ValueError(f"Split {split!r} must be one list of files, got {', '.join(map(str, paths))}.")
    builder, options = LIST_BUILDERS[paths[0].suffix], {}
    wanted = ["path", "label"] if target == "label" else ["path"]
    if builder == "csv" and target != "captions":
        with paths[0].open(encoding="utf-8-sig") as file:
            header = [name.strip() for name in file.readline().split(",")]
        if Path(header[0]).suffix and len(header) <= 2:  # as in the lists of the original release
            options = {"names": ["path", "label"][: max(len(header), len(wanted))], "header": None}
    loaded = _known(
        load_dataset(builder, data_files={split: str(paths[0])}, split=split, streaming=streaming, **options)
    )
    found = next((column for column in PATH_COLUMNS if column in loaded.features), "path")
    if found != "path":
        loaded = loaded.rename_column(found, "path")
    if set(wanted) - set(loaded.features):
        columns = " and ".join(f"`{name}`" for name in wanted)
        raise ValueError(f"{paths[0]} must have the columns {columns}, got {', '.join(loaded.features)}.")
    first = next(iter(loaded))["path"]
    kind = "image" if Path(first).suffix.lower() in PILImage.registered_extensions() else "video"
    features = loaded.features.copy()
    features[kind] = Video(decode=False) if kind == "video" else Image(decode=False)
    del features["path"]
    return loaded.map(_as_media, fn_kwargs={"kind": kind, "root": root}, remove_columns="path", features=features)


def _as_media(example: dict[str, Any], kind: str, root: str) -> dict[str, Any]:
    path = example["path"]
    return {kind: {"path": path if "://" in path else str(Path(root) / path), "bytes": None}}


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


def _label_in_json(example: dict[str, Any]) -> dict[str, Any]:
    return {"label": example["json"]["label"]}


def _with_labels(split: Split, name: str, regression: bool, label_names: list[str] | None) -> Split:
    """With the column `label` as class indices with names, or as numbers to predict."""
    if "label" not in split.features and "cls" in split.features:
        split = split.rename_column("cls", "label")
    elif "label" not in split.features and "json" in split.features:
        split = _known(split.map(_label_in_json, remove_columns="json"))
    if "label" not in split.features:
        raise ValueError(f"The {name} must have a column `label`, got {', '.join(split.features)}.")
    feature = split.features["label"]
    names = feature.names if isinstance(feature, ClassLabel) else None
    dtype = getattr(feature, "dtype", str(feature))
    if regression or dtype.startswith("float"):
        if names is not None or not dtype.startswith(("float", "int")):
            raise ValueError(f"The labels of the {name} must be numbers for regression, got {feature}.")
        return split.cast_column("label", Value("float32"))
    if label_names is None:
        label_names = names or _found_names(split, name, dtype)
    if names == label_names:
        return split
    lookup = {"names": names, "label_names": label_names, "name": name}
    features = split.features.copy()
    features["label"] = ClassLabel(names=label_names)
    return split.map(_numbered, fn_kwargs=lookup, features=features)


def _found_names(split: Split, name: str, dtype: str) -> list[str]:
    if not isinstance(split, Dataset):
        raise ValueError(f"The {name} is streamed and its labels have no names: pass `label_names`.")
    labels = split.unique("label")
    return sorted(labels) if dtype.endswith("string") else [str(index) for index in range(max(labels) + 1)]


def _numbered(example: dict[str, Any], names: list[str] | None, label_names: list[str], name: str) -> dict[str, Any]:
    """The class index of a label, which is a name, or an index into `names` or else into `label_names`."""
    label = example["label"]
    if isinstance(label, int) and names is None:
        index = label if 0 <= label < len(label_names) else None
    else:
        label = names[label] if names is not None else label
        index = label_names.index(label) if label in label_names else None
    if index is None:
        raise ValueError(f"The label {label!r} in the {name} is not one of its {len(label_names)} classes.")
    return {"label": index}
