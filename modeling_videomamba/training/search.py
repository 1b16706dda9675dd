"""Searching a collection of videos: candidates by embeddings, judged by the fusion layers."""

import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import BatchEncoding

from ..modeling_videomamba_video_text import VideoMambaForVideoTextRetrieval
from ..processing_videomamba import VideoMambaProcessor
from ..video_decoding import VideoFile
from ..video_processing_videomamba import VideoMambaVideoProcessor
from .collection import Collection, check_faiss, embed
from .data import BROKEN
from .previews import clock_time
from .video_text_models import fingerprint, load_retrieval_model
from .windows import ShardError, Source, VideoWindow, find_remote, locate, open_video, read_media, window_pixels

MIN_MATCH = 0.5  # probability that a video matches a text, of one that fits
RERANKED = 32  # candidates, if no other number is asked for
FUSED_TOGETHER = 8  # windows of a batch


@dataclass
class Hit:
    """
    A window that was found: its cosine with the query, mean over the frames for a text; where they are known, the
    probability that it matches the text, and what the model sees of it, `pixels` `(1, frames, 3, height, width)`.
    """

    window: VideoWindow
    similarity: float
    probability: float | None = None
    pixels: torch.Tensor | None = None

    def read_pixels(self) -> torch.Tensor:
        """`pixels`. Raises `ValueError` before [`Search.with_pixels`] has read them."""
        if self.pixels is None:
            raise ValueError(f"the frames of {self.window.path} have not been read")
        return self.pixels

    @property
    def time(self) -> str:
        """From when to when."""
        end = "end" if self.window.end is None else clock_time(self.window.end)
        return f"{clock_time(self.window.start)}\N{EN DASH}{end}"


def warn_of(hits: list[Hit]) -> str:
    """What to tell where the fusion layers find that no hit matches; else, or where they were not asked, nothing."""
    best = max((hit.probability for hit in hits if hit.probability is not None), default=1.0)
    return "" if best >= MIN_MATCH else f"nothing fits well: the best match has a probability of {best:.3f}"


class Search:
    r"""
    A search in a table of windows.

    Args:
        collection ([`Collection`]): Has a finished table.
        column (`str`): What is compared: `"embedding"` with texts, `"direction"` with clips.
        root (`str`): What the paths of its videos are relative to.
        processor ([`VideoMambaVideoProcessor`]): Of the model.

    `left_out` gets the reason for each file that isn't as it was when it was indexed, which is not among the hits.
    """

    def __init__(self, collection: Collection, column: str, root: str, processor: VideoMambaVideoProcessor):
        self.column, self.root, self.processor = column, root, processor
        self.table, self.frames = collection.table(column), collection.frames
        self.rows = self.table.select_columns(list(VideoWindow._fields))
        self.left_out: dict[str, str] = {}
        self._unchanged: set[str] = set()

    def candidates(self, query: torch.Tensor, at_once: int) -> Iterator[Hit]:
        r"""
        All windows, the most similar first.

        Args:
            query (`torch.Tensor` of shape `(projection_dim,)`): l2-normalised.
            at_once (`int`): How many are wanted; for more FAISS is asked again.
        """
        seen: set[int] = set()
        while len(seen) < len(self.rows):
            at_once = min(at_once, len(self.rows))
            for similarity, row in zip(*self.table.search(self.column, query.cpu().numpy(), at_once), strict=True):
                if row not in seen:
                    seen.add(row)
                    window = VideoWindow(**self.rows[int(row)])
                    if self._is_unchanged(window):
                        yield Hit(window, float(similarity))
            at_once *= 4

    def _is_unchanged(self, window: VideoWindow) -> bool:
        name = window.file.path
        if name not in self._unchanged and name not in self.left_out:
            if changed := self.change(window):
                self.left_out[name] = f"{name}: {changed} since it was indexed"
            else:
                self._unchanged.add(name)
        return name in self._unchanged

    def change(self, window: VideoWindow) -> str | None:
        """`"removed"` or `"changed"` where the file of a window isn't as it was when it was indexed."""
        try:
            if "://" in window.file.path:
                size, version = find_remote(window.file.path)[1:]
            else:
                found = Path(locate(self.root, window.file.path)).stat()
                size, version = found.st_size, found.st_mtime_ns
        except ShardError:  # nobody knows; reported when it is read
            return None
        except OSError:
            return "removed"
        if (size, version) == (window.size, window.mtime):
            return None
        return "removed" if size is None and version is None else "changed"

    def with_pixels(self, hits: Iterable[Hit]) -> Iterator[Hit]:
        """Those of which the frames can be read. Of a shard that can't be, the rest is not tried."""
        with OpenVideo(self) as opened:
            for hit in hits:
                if hit.window.file.path in self.left_out:
                    continue
                try:
                    if hit.pixels is None:
                        reader = opened.of(hit.window)
                        hit.pixels = window_pixels(reader, hit.window.start, hit.window.end, self.processor)
                except ShardError as error:
                    self.left_out[hit.window.file.path] = str(error)
                    self._unchanged.discard(hit.window.file.path)
                except BROKEN as error:
                    self.left_out[hit.window.path] = str(error)
                else:
                    yield hit


class OpenVideo(ExitStack):
    """The video of the last window stays open for the next one: to open a video of hours takes as long as a window."""

    def __init__(self, search: Search):
        super().__init__()
        self.search = search
        self.video: Source | None = None
        self.reader: VideoFile | None = None

    def of(self, window: VideoWindow) -> VideoFile:
        """Raises [`ShardError`] or as [`open_video`]."""
        if self.reader is None or self.video != window.video:
            self.close()
            self.reader = None
            media, index = read_media(self.search.root, window.path), self.search.frames.read(window.video)
            self.video, self.reader = window.video, self.enter_context(open_video(media, index))
        return self.reader


def load_search(folder: Path, column: str) -> tuple[Search, VideoMambaForVideoTextRetrieval, VideoMambaProcessor]:
    r"""
    A search in the folder of an index, with the model that made it, on the GPU if there is one.

    Args:
        folder (`Path`): Of a [`Collection`] with `settings.json`.
        column (`str`): As in [`Search`].

    Raises:
        `ImportError`: if FAISS is missing.
        `OSError`, `ValueError`: if there is no finished index, a file of it is damaged, or its model can't be loaded or
            is another than it was.
    """
    check_faiss()
    collection = Collection(folder)
    collection.table_folder()  # before the model, which takes longer
    settings = collection.settings()
    model, processor = load_retrieval_model(settings["model"])
    if fingerprint(model, processor) != settings["weights"]:
        raise ValueError(f"{settings['model']} has other weights, or another processor, than when {folder} was made")
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    return Search(collection, column, settings["folder"], processor.video_processor), model, processor


def find(
    search: Search, query: "Text | torch.Tensor", top_k: int, reranked: int = RERANKED, with_pixels: bool = False
) -> tuple[list[Hit], dict[str, float]]:
    r"""
    The best hits.

    Args:
        search ([`Search`]): In `"embedding"` for a text, in `"direction"` for a clip.
        query ([`Text`] or `torch.Tensor` of shape `(projection_dim,)`): Only the hits of a text are ranked again.
        top_k (`int`): Hits wanted.
        reranked (`int`, defaults to 32): Candidates to rank again, 0 for none.
        with_pixels (`bool`, defaults to `False`): Whether the hits are to have `pixels`.

    Returns:
        `tuple[list[Hit], dict[str, float]]`: the hits, best first; the milliseconds that the candidates took,
        `search_ms`, and the fusion layers, `rerank_ms`, if they were asked.
    """
    began = time.perf_counter()
    wanted = max(top_k, reranked)
    found = search.candidates(query.embedding if isinstance(query, Text) else query, wanted)
    candidates = chain(list(islice(found, wanted)), found)
    times = {"search_ms": 1000 * (time.perf_counter() - began)}
    best: list[Hit] = []
    if isinstance(query, Text) and reranked:
        began = time.perf_counter()
        best = query.rerank(islice(search.with_pixels(candidates), reranked), keep=top_k if with_pixels else 0)
        times["rerank_ms"] = 1000 * (time.perf_counter() - began)
    ranked: Iterator[Hit] = chain(best, candidates)
    return list(islice(search.with_pixels(ranked) if with_pixels else ranked, top_k)), times


def embed_clip(path: str, model: VideoMambaForVideoTextRetrieval, processor: VideoMambaProcessor) -> torch.Tensor:
    """The direction of all of a video as one window, `(projection_dim,)`; raises as [`open_video`] does."""
    with open_video(path) as reader:
        pixels = window_pixels(reader, 0.0, None, processor.video_processor)
    return F.normalize(embed(model, pixels.to(model.device))[0], dim=-1)


class Text:
    r"""
    A text as a model sees it: `embedding` `(projection_dim,)`, l2-normalised, and what the fusion layers go on with.

    Raises:
        `ValueError`: if it is empty, or has more tokens than the model has positions.
    """

    def __init__(self, text: str, model: VideoMambaForVideoTextRetrieval, processor: VideoMambaProcessor):
        if not text.strip():
            raise ValueError("the text is empty")
        self.model = model
        self.tokens: BatchEncoding = processor(text=[text], return_tensors="pt").to(model.device)
        length, longest = self.tokens["input_ids"].shape[1], model.text_model.config.max_position_embeddings
        if length > longest:
            raise ValueError(f"the text has {length} tokens, of which the model takes at most {longest}")
        features = model.get_text_features(self.tokens["input_ids"], self.tokens["attention_mask"])
        self.hidden_states = features.last_hidden_state
        self.embedding = F.normalize(features.pooler_output.float(), dim=-1)[0]

    def rerank(self, hits: Iterable[Hit], keep: int = 0) -> list[Hit]:
        """
        The hits, which have pixels, by the probability that they match the text, which they get. Only the first `keep`
        have pixels still.
        """
        left = iter(hits)
        judged: list[Hit] = []
        while batch := list(islice(left, FUSED_TOGETHER)):
            pixels = torch.cat([hit.read_pixels() for hit in batch]).to(self.model.device)
            videos = self.model.get_video_features(pixels).last_hidden_state
            texts = self.hidden_states.expand(len(batch), -1, -1)
            mask = self.tokens["attention_mask"].expand(len(batch), -1)
            logits = self.model.matching_logits_of_encoded(videos, texts, mask)
            for hit, probability in zip(batch, logits.float().softmax(-1)[:, 1].tolist(), strict=True):
                hit.probability = probability
            judged = sorted([*judged, *batch], key=lambda hit: -(hit.probability or 0))
            for hit in judged[keep:]:
                hit.pixels = None
        return judged
