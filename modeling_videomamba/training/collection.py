"""A collection of videos that can be searched: an embedding of each window of each video, in a table on disk."""

import json
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset, Features, List, Value, load_from_disk

from ..modeling_videomamba_video_text import VideoMambaForVideoTextRetrieval
from .frame_indexes import FrameIndexes
from .output import lock, read_object, writing
from .retrieval import mean_directions
from .tensor_store import TensorStore
from .windows import Source, VideoWindow, split_path

VECTORS = ("embedding", "direction")
SETTINGS = "settings.json"  # what an index was made with
TABLE = "table-[0-9a-f]{32}"


def check_faiss() -> None:
    """Raises `ImportError` where FAISS is missing."""
    if find_spec("faiss") is None:
        raise ImportError('searching needs FAISS: `pip install "modeling-videomamba[search]"`')


def embed(model: VideoMambaForVideoTextRetrieval, pixel_values: torch.Tensor) -> torch.Tensor:
    """
    Mean over the frames of the normalised embedding of each, `(windows, projection_dim)`, float32: its inner product
    with the normalised embedding of a text is what [`similarities`] computes.
    """
    return mean_directions(model.get_video_features(pixel_values).pooler_output)


class Collection:
    r"""
    A folder with a finished table, if there is one, with `parts`, the embeddings of a run that hasn't ended, and with
    `frames`, the frame indexes of its long videos. A table has a row for each window with `embedding`, `direction` (its
    unit vector), and a FAISS index of each. Each run that changes it writes another folder, of which the file `current`
    has the name.

    Args:
        folder (`Path`): May not exist yet.
    """

    def __init__(self, folder: Path):
        self.folder, self.current = folder, folder / "current"
        self.parts, self.frames = TensorStore(folder / "parts"), FrameIndexes(folder / "frames")

    @property
    def is_empty(self) -> bool:
        """Whether nothing has been embedded yet."""
        return not self.current.exists() and not self.parts.places()

    def lock(self) -> AbstractContextManager[None]:
        """Keeps others from writing. Raises `ValueError` where another run does."""
        return lock(self.folder)

    @contextmanager
    def _reading(self, path: Path) -> Iterator[Path]:
        """Raises `ValueError` that names a file of the index and says what to do, whatever fails while it is read."""
        try:
            yield path
        except Exception as error:  # a damaged file fails in any way
            reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error).removeprefix(f"{path} ")
            message = f"{path}: damaged ({' '.join(reason.split())}): delete {self.folder} and index again"
            raise ValueError(message) from error

    def settings(self) -> dict[str, Any]:
        """What the index was made with. Raises `ValueError` where the file is damaged or missing."""
        with self._reading(self.folder / SETTINGS) as path:
            settings = read_object(path)
            for name in ("model", "weights", "folder"):
                if not isinstance(settings[name], str):
                    raise ValueError(f"{name} must be text, got {settings[name]!r}")
        return settings

    def table_folder(self) -> Path:
        """Folder of the finished table. Raises `FileNotFoundError` without one, `ValueError` if it is damaged."""
        if not self.current.exists():
            raise FileNotFoundError(f"{self.folder} has no finished index")
        with self._reading(self.current) as path:
            name = path.read_text("utf-8")
            if not re.fullmatch(TABLE, name) or not (self.folder / name).is_dir():
                raise ValueError(f"it must name a table, got {name!r}")
        return self.folder / name

    def table(self, column: str | None = None) -> Dataset:
        """The finished table, with the FAISS index of a column of vectors. Raises `ValueError` for a damaged file."""
        folder = self.table_folder()
        with self._reading(folder / "state.json") as path:
            names = [file["filename"] for file in read_object(path)["_data_files"]]
        with self._reading(folder / "dataset_info.json") as path:
            read_object(path)
        for name in names:
            with self._reading(folder / name) as path:
                Dataset.from_file(str(path))
        with self._reading(folder):
            table = load_from_disk(str(folder))
        if column is not None:
            with self._reading(folder / f"{column}.faiss") as path:
                table.load_faiss_index(column, str(path))
        return table

    def windows(self) -> list[VideoWindow]:
        """Windows of the finished table, in the order of its rows."""
        return read_windows(self.table()) if self.current.exists() else []

    def embedded(self, files: Iterable[Source]) -> set[VideoWindow]:
        """The windows that needn't be embedded again, of files that are as they were."""
        fresh = {_window(key) for key in self.parts.places()}
        cuts = {window.video: window.cut for window in fresh}  # earlier versions cut some videos into other windows
        kept = {window for window in self.windows() if cuts.get(window.video, window.cut) == window.cut}
        current = set(files)
        return {window for window in fresh | kept if window.file in current}

    def finish(self, files: Iterable[Source]) -> list[VideoWindow]:
        """
        Makes table and parts one table, without what is not of `files` as they are, and returns its windows. Raises
        `ValueError` if there is none.
        """
        windows = sorted(self.embedded(files), key=lambda window: (window.path, window.start))
        if not windows:
            raise ValueError("no video could be read")
        before = self.windows()
        if windows != before:
            self._replace(self._table(windows, before))
        for path in self.folder.iterdir():
            if re.fullmatch(TABLE, path.name) and path != self.table_folder():
                shutil.rmtree(path, ignore_errors=True)  # it may still be read; the next run tries again
        shutil.rmtree(self.parts.folder, ignore_errors=True)
        self.frames.keep({window.video for window in windows})
        return windows

    def _table(self, windows: list[VideoWindow], before: list[VideoWindow]) -> Dataset:
        rows = {window: row for row, window in enumerate(before)}
        kept = [index for index, window in enumerate(windows) if window in rows]
        fresh = [index for index, window in enumerate(windows) if window not in rows]
        vectors = []
        if kept:
            table = self.table().select_columns("embedding").with_format("torch")
            vectors.append(table[[rows[windows[index]] for index in kept]]["embedding"])
        if fresh:
            places = {_window(key): place for key, place in self.parts.places().items()}
            vectors.append(self.parts.read([places[windows[index]] for index in fresh], "embedding"))
        embedding = torch.cat(vectors)[torch.tensor(kept + fresh).argsort()]
        columns: dict[str, Any] = dict(zip(VideoWindow._fields, map(list, zip(*windows, strict=True)), strict=True))
        columns |= {"embedding": embedding.numpy(), "direction": F.normalize(embedding, dim=-1).numpy()}
        types = ("string", "int64", "int64", "float64", "float64", "int64")
        features = Features({name: Value(dtype) for name, dtype in zip(VideoWindow._fields, types, strict=True)})
        features |= dict.fromkeys(VECTORS, List(Value("float32"), length=embedding.shape[1]))
        return Dataset.from_dict(columns, features=features)

    def _replace(self, table: Dataset) -> None:
        """The table and its indexes appear at once. Raises [`WriteError`] where the disk refuses."""
        import faiss

        name = f"table-{uuid.uuid4().hex}"
        unfinished = self.folder / "current.writing"
        with writing(self.folder):
            table.save_to_disk(str(self.folder / name))
            for column in VECTORS:
                table.add_faiss_index(column, metric_type=faiss.METRIC_INNER_PRODUCT)
                table.save_faiss_index(column, str(self.folder / name / f"{column}.faiss"))
                table.drop_index(column)
            unfinished.write_text(name, "utf-8")
            unfinished.replace(self.current)


def read_windows(table: Dataset) -> list[VideoWindow]:
    """Of a table, in its order."""
    columns = table.select_columns(list(VideoWindow._fields)).to_dict()
    return [VideoWindow(*row) for row in zip(*(columns[name] for name in VideoWindow._fields), strict=True)]


def _window(key: str) -> VideoWindow:
    return VideoWindow(*json.loads(key))


def describe_changes(
    before: list[VideoWindow], known: set[VideoWindow], now: list[VideoWindow], broken: dict[str, str]
) -> str:
    r"""
    What a run did, in a line.

    Args:
        before, now (`list[VideoWindow]`): Windows of the finished table, before and after the run.
        known (`set[VideoWindow]`): What had been embedded before the run.
        broken (`dict[str, str]`): Why what can't be read can't, by its path.
    """
    fresh = [window for window in now if window not in known]
    embedded, present = {window.path for window in fresh}, {window.path for window in now}
    stale = {window.path for window in before} - {window.path for window in set(before) & set(now)}
    changed = {path for path in stale if path in present or path in broken or split_path(path)[0] in broken}
    return (
        f"embedded {len(fresh)} clips of {len(embedded)} videos, kept {len(present - embedded)}, "
        f"changed {len(changed)}, removed {len(stale - changed)}, broken {len(broken)}"
    )
