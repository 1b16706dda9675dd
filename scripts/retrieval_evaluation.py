"""Testing a model of videos and texts, as evaluate_retrieval.py does."""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, tqdm
from datasets import Value
from rich.console import Console
from rich.table import Table

from modeling_videomamba.training.annotations import load_annotated
from modeling_videomamba.training.data import EvaluationViews, Examples, broken_file, media_id, test_batches
from modeling_videomamba.training.loop import start_accelerator
from modeling_videomamba.training.metrics import retrieval_metrics
from modeling_videomamba.training.output import check_folder, replace_files
from modeling_videomamba.training.reports import METRICS
from modeling_videomamba.training.reranking import (
    encode_text_parts,
    encode_video_parts,
    match_parts,
    pairs_to_rank,
    rerank,
)
from modeling_videomamba.training.retrieval import texts_of
from modeling_videomamba.training.settings import check_settings
from modeling_videomamba.training.sources import Split, find_evaluation_split, load_split, media_kind
from modeling_videomamba.training.tensor_store import Place, TensorStore
from modeling_videomamba.training.video_text_models import fingerprint, image_processor_of, load_retrieval_model
from modeling_videomamba.training.workers import iterate


def load_videos(args: Any) -> tuple[Split, dict[str, str]]:
    """Videos or images with `captions`, and names without a file."""
    skip = args.on_broken_video == "skip"
    if args.annotations is not None and args.videos is not None:
        options: dict[str, Any] = {"split": args.annotation_split, "names": args.names, "paragraphs": args.paragraphs}
        split, missing = load_annotated(args.annotations, args.videos, skip_missing=skip, **options)
    else:
        name = args.split or find_evaluation_split(str(args.data))
        split, missing = load_split(str(args.data), name, data_root=args.data_root, target="captions"), {}
    if args.first_seconds is not None and media_kind(split) == "image":
        raise ValueError(f"--first-seconds {args.first_seconds}: the data are images")
    if args.first_seconds is not None:
        for name, seconds in (("start", 0.0), ("end", args.first_seconds)):
            split = split.add_column(name, [seconds] * len(split), feature=Value("float64"))
    return split, missing


def version_of(media: dict[str, Any]) -> list[Any]:
    """Path, size and time of a file, as far as they are known, or path and number of what has been read."""
    path = media["path"]
    if media["bytes"] is not None:
        return [path, media_id(media)]
    found = Path(path).stat() if path is not None and Path(path).is_file() else None
    return [path, None, None] if found is None else [path, found.st_size, found.st_mtime_ns]


def content_hash(content: Any) -> str:
    """16 digits for anything that JSON can hold."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def joined(texts: list[str], owners: list[int]) -> tuple[list[str], list[int]]:
    """The texts of each video as one."""
    paragraphs: dict[int, list[str]] = {}
    for text, owner in zip(texts, owners, strict=True):
        paragraphs.setdefault(owner, []).append(text)
    return [" ".join(sentences) for sentences in paragraphs.values()], list(paragraphs)


class Evaluation:
    """A run: what is on disk, and what is to be done."""

    def __init__(self, args: Any, accelerator: Accelerator):
        self.args, self.accelerator = args, accelerator
        with accelerator.main_process_first():
            self.split, self.missing = load_videos(args)
            self.model, processor = load_retrieval_model(args.model)
        self.tokenizer, self.processor = processor.tokenizer, processor.video_processor
        self.fingerprint = fingerprint(self.model, processor)
        if media_kind(self.split) == "image":
            self.processor = image_processor_of(self.processor)
        longest = self.model.text_model.config.max_position_embeddings
        if args.max_text_length > longest:
            raise ValueError(f"--max-text-length must be at most {longest}, got {args.max_text_length}")
        rows, self.texts, self.owners = texts_of(self.split)
        self.split = self.split.select(rows)
        if args.paragraphs:
            self.texts, self.owners = joined(self.texts, self.owners)
        stores = ("videos" if args.top_k else "videos-without-tokens", "texts")
        self.videos, self.text_parts = (TensorStore(args.output_dir / name) for name in stores)
        if accelerator.is_main_process:
            owner = f"--output-dir {args.output_dir} has an evaluation"
            check_settings(args.output_dir / "settings.json", self._settings(), owner)
        accelerator.wait_for_everyone()
        self.model.to(accelerator.device).eval()

    def _settings(self) -> dict[str, str]:
        """What the encoded videos and texts depend on; files by path, size and time, what is in shards by content."""
        args, kind = self.args, media_kind(self.split)
        versions = [version_of(row[kind]) for row in self.split.select_columns(kind)]
        return {
            "model": self.fingerprint,
            "videos": f"{len(versions)} ({content_hash(versions)})",
            "texts": f"{len(self.texts)} ({content_hash([self.texts, self.owners])})",
            "paragraphs": str(args.paragraphs),
            "first_seconds": str(args.first_seconds),
            "max_text_length": str(args.max_text_length),
            "mixed_precision": self.accelerator.mixed_precision,
        }

    def remaining(self, store: TensorStore, indices: list[int]) -> list[int]:
        """Those without a part, the same on every process."""
        done = store.places()
        self.accelerator.wait_for_everyone()
        return [index for index in indices if str(index) not in done]

    def places(self, store: TensorStore) -> dict[int, Place]:
        """Of all that has been written, by index, in order."""
        self.accelerator.wait_for_everyone()
        return {int(key): place for key, place in sorted(store.places().items(), key=lambda item: int(item[0]))}

    def encode_videos(self) -> dict[str, str]:
        """Those that are not yet on disk; returns reasons of files that could not be read."""
        args, accelerator, broken = self.args, self.accelerator, []
        indices = self.remaining(self.videos, list(range(len(self.split))))
        keys = test_batches(indices, args.batch_size, accelerator.process_index, accelerator.num_processes)
        examples = Examples(self.split, EvaluationViews(self.processor), skip_broken=args.on_broken_video == "skip")
        batches = iterate(examples, min(args.num_workers, len(keys)), batch_sampler=keys)
        with self._bar("videos", len(self.split), len(self.split) - len(indices)) as bar:
            for batch in encode_video_parts(accelerator, self.model, batches, self.videos, args.top_k > 0):
                broken += batch["broken"]
                bar.update(min(len(batch["names"]) * accelerator.num_processes, bar.total - bar.n))
        return dict(gather_object(broken))

    def encode_texts(self) -> None:
        """Those that are not yet on disk."""
        own = self._share(self.remaining(self.text_parts, list(range(len(self.texts)))))
        options = (self.texts, own, self.args.max_text_length, self.text_parts)
        encode_text_parts(self.accelerator, self.model, self.tokenizer, *options)

    def match(self, wanted: dict[int, list[int]], videos: dict[int, Place], texts: dict[int, Place]) -> torch.Tensor:
        """Scores of the pairs, of which those are computed that are not yet on disk."""
        pairs = content_hash([wanted, list(texts)])  # which depend on what could be read
        matches = TensorStore(self.args.output_dir / "matches" / pairs)
        left = self.remaining(matches, list(wanted))
        own = {video: wanted[video] for video in self._share(left)}
        with self._bar("matching", len(wanted), len(wanted) - len(left)) as bar:

            def advance() -> None:
                bar.update(min(self.accelerator.num_processes, bar.total - bar.n))

            match_parts(self.accelerator, self.model, own, videos, texts, matches, advance)
        places = self.places(matches)
        return TensorStore.read([places[video] for video in wanted], "match")

    def _share(self, indices: list[int]) -> list[int]:
        return indices[self.accelerator.process_index :: self.accelerator.num_processes]

    @staticmethod
    def _bar(name: str, total: int, done: int) -> Any:
        return tqdm(total=total, initial=done, unit="video", desc=f"{name}, all processes")

    def run(self) -> dict[str, Any]:
        """Encodes and ranks; the summary."""
        broken = {**self.missing, **self.encode_videos()}
        self.encode_texts()
        videos, texts = self.places(self.videos), self.places(self.text_parts)
        if not videos:
            raise ValueError("no video could be read: " + "; ".join(broken.values()))
        row_of = {video: row for row, video in enumerate(videos)}
        kept = [text for text, owner in enumerate(self.owners) if owner in row_of]
        owners = torch.tensor([row_of[self.owners[text]] for text in kept])
        text_places = {row: texts[text] for row, text in enumerate(kept)}
        directions = TensorStore.read(videos.values(), "direction"), TensorStore.read(text_places.values(), "direction")
        scores = directions[0] @ directions[1].T
        summary: dict[str, Any] = {"dual_encoder": retrieval_metrics(scores, scores.T, owners)}
        if self.args.top_k:
            pairs = pairs_to_rank(scores, self.args.top_k)
            wanted = {video: pairs[row].nonzero().flatten().tolist() for video, row in row_of.items()}
            matches = self.match(wanted, videos, text_places)
            ranked = rerank(scores, matches, self.args.top_k), rerank(scores.T, matches.T, self.args.top_k)
            summary[f"top_{self.args.top_k}_by_fusion"] = retrieval_metrics(*ranked, owners)
        cut = int(TensorStore.read(text_places.values(), "is_cut").sum())
        return {**summary, "videos": len(videos), "texts": len(kept), "cut_texts": cut, "broken": broken}


def report(summary: dict[str, Any], folder: Path) -> None:
    """A table, and JSON."""
    text = json.dumps(summary, indent=2)
    replace_files(folder, lambda folder: (folder / "metrics.json").write_text(text, "utf-8"))
    ways = [name for name, value in summary.items() if isinstance(value, dict) and name != "broken"]
    table = Table("metric", *(name.replace("_", " ") for name in ways))
    table.title = f"{summary['videos']} videos, {summary['texts']} texts"
    for name in summary[ways[0]]:
        table.add_row(METRICS[name], *(f"{summary[way][name]:.2f}" for way in ways))
    Console().print(table)
    if summary["cut_texts"]:
        print(f"{summary['cut_texts']} texts were longer than --max-text-length, and cut")
    for name, reason in summary["broken"].items():
        print(f"left out: {reason if name in reason else f'{name}: {reason}'}")


def run(args: Any) -> None:
    """
    Tests a model. `args` are the arguments of evaluate_retrieval.py. What is wrong with them ends the process with a
    message.
    """
    try:
        accelerator = start_accelerator(mixed_precision=args.mixed_precision)
        if accelerator.is_main_process:
            check_folder(args.output_dir)
        evaluation = Evaluation(args, accelerator)
        summary = evaluation.run()
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            report(summary, args.output_dir)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    except RuntimeError as error:
        reason = broken_file(error)
        if reason is None:
            raise
        sys.exit(f"error: {reason}")
    accelerator.end_training()
