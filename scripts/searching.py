"""Indexing and searching videos, as search_videos.py does."""

import argparse
import json
import sys
import time
from collections.abc import Iterable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import broadcast_object_list, gather_object, tqdm
from rich.console import Console
from rich.table import Table
from rich.text import Text as Plain
from transformers import logging

from filmstrips import draw_filmstrip
from modeling_videomamba.training.collection import SETTINGS, Collection, check_faiss, describe_changes, embed
from modeling_videomamba.training.loop import start_accelerator
from modeling_videomamba.training.output import writing
from modeling_videomamba.training.plots import pyplot
from modeling_videomamba.training.search import (
    RERANKED,
    Hit,
    Search,
    Text,
    embed_clip,
    find,
    load_search,
    warn_of,
)
from modeling_videomamba.training.settings import check_settings
from modeling_videomamba.training.tensor_store import TensorStore
from modeling_videomamba.training.video_text_models import fingerprint, load_retrieval_model
from modeling_videomamba.training.windows import (
    Share,
    Source,
    VideoWindow,
    Windows,
    find_files,
    is_shard,
)
from modeling_videomamba.training.workers import iterate

# a process waits for the others, whose videos may be longer, and for the main one, which writes the table
PATIENCE = InitProcessGroupKwargs(timeout=timedelta(days=7))


# Indexing


def index(args: argparse.Namespace) -> None:
    accelerator = start_accelerator(mixed_precision=args.mixed_precision, kwargs_handlers=[PATIENCE])
    found: list[list[Source]] = [find_files(args.data) if accelerator.is_main_process else []]
    (files,) = broadcast_object_list(found)
    with accelerator.main_process_first():
        model, processor = load_retrieval_model(args.model)
    collection = Collection(args.out)
    with collection.lock() if accelerator.is_main_process else nullcontext():
        if accelerator.is_main_process:
            check_index(collection, args, fingerprint(model, processor), accelerator.mixed_precision)
        accelerator.wait_for_everyone()
        before, known = collection.windows(), collection.embedded(files)
        accelerator.wait_for_everyone()  # nobody writes before all have read
        broken = embed_missing(args, accelerator, model, processor, files, known)
        if accelerator.is_main_process:
            for reason in broken.values():
                print(f"broken: {reason}")
            now = collection.finish(files)
            print(describe_changes(before, known, now, broken))
        accelerator.wait_for_everyone()
    accelerator.end_training()


def check_index(collection: Collection, args: argparse.Namespace, weights: str, mixed_precision: str) -> None:
    """What is embedded with other settings is not mixed."""
    settings = {
        "model": str(Path(args.model).resolve()) if Path(args.model).is_dir() else args.model,
        "weights": weights,
        "folder": root_of(args.data),
        "clip_seconds": args.clip_seconds,
        "mixed_precision": mixed_precision,
    }
    if collection.is_empty:  # but for the settings of a run that did nothing
        (args.out / SETTINGS).unlink(missing_ok=True)
    else:
        collection.settings()  # raises if the file is damaged or missing
    check_settings(args.out / SETTINGS, settings, f"{args.out} is an index of another run")


def root_of(data: list[str]) -> str:
    """What the paths of videos are relative to."""
    return str(Path(data[0]).resolve()) if Path(data[0]).is_dir() else ""


def embed_missing(
    args: argparse.Namespace,
    accelerator: Accelerator,
    model: Any,
    processor: Any,
    files: list[Source],
    known: set[VideoWindow],
) -> dict[str, str]:
    """Embeds the windows that are not `known`; returns the reason for each file that can't be read."""
    collection = Collection(args.out)
    complete = collection.frames.complete(known)
    remaining = [file for file in files if is_shard(file.path) or file not in complete]
    if not remaining:
        return {}
    share = Share(accelerator.process_index, accelerator.num_processes)
    root, frames = root_of(args.data), collection.frames
    windows = Windows(remaining, root, processor.video_processor, args.clip_seconds, known, frames, share)
    has_shards = any(is_shard(file.path) for file in remaining)
    most = -(-len(remaining) // accelerator.num_processes)
    batches = iterate(
        windows, args.num_workers if has_shards else min(args.num_workers, most), batch_size=args.batch_size
    )
    store, stop = collection.parts, args.on_broken_video == "raise"
    with tqdm(total=None if has_shards else most, unit="video", desc="videos of this process") as bar:
        broken = embed_all(accelerator, model.to(accelerator.device), batches, store, bar, stop)
    return dict(gather_object(list(broken.items())))


def embed_all(
    accelerator: Accelerator, model: Any, batches: Iterable[dict[str, Any]], store: TensorStore, bar: Any, stop: bool
) -> dict[str, str]:
    """Embeds windows; returns the reason for each file that can't be read, or raises `ValueError` if it is to stop."""
    broken: dict[str, str] = {}
    seen: set[str] = set()
    for batch in batches:
        keys = [name for name in batch["names"] if name]
        if keys:
            pixels = batch["pixel_values"][batch["valid"]].to(accelerator.device)
            with torch.inference_mode(), accelerator.autocast():
                embedding = embed(model, pixels)
            if not embedding.isfinite().all():
                raise ValueError(f"embeddings are not finite, of one of {', '.join(keys)}: try --mixed-precision no")
            store.write(keys, {"embedding": embedding})
        for path, reason in batch["broken"]:
            broken.setdefault(path, reason)
        if broken and stop:
            raise ValueError("; ".join(broken.values()))
        paths = {json.loads(key)[0] for key in keys} | {path for path, _ in batch["broken"]}
        bar.update(len(paths - seen))
        seen |= paths
    return broken


# Searching


def query(args: argparse.Namespace) -> None:
    if args.picture is not None:
        pyplot()  # before the search, if matplotlib is missing
    search, model, processor = load_search(args.out, "embedding" if args.video is None else "direction")
    with torch.inference_mode():
        began = time.perf_counter()
        wanted = embed_clip(args.video, model, processor) if args.text is None else Text(args.text, model, processor)
        encoding_ms = 1000 * (time.perf_counter() - began)
        reranked = RERANKED if args.rerank is None else args.rerank
        hits, times = find(search, wanted, args.top_k, reranked, with_pixels=args.picture is not None)
    times["search_ms"] += encoding_ms
    if args.picture is not None and hits:
        draw_picture(hits, processor.video_processor, args.picture)
    if args.json:
        print_json(hits, search, times)
    else:
        print_table(hits, search, times)
    if args.picture is not None and not hits:
        print(f"no hits, {args.picture} is not drawn", file=sys.stderr)
    for reason in search.left_out.values():
        print(f"left out: {reason}", file=sys.stderr)


def draw_picture(hits: list[Hit], processor: Any, path: Path) -> None:
    """A row for each of the hits, which have pixels: frames as the model sees them, under where they are and scores."""
    plots = pyplot()
    figure, axes = plots.subplots(len(hits), figsize=(14, 2 * len(hits) + 0.5), squeeze=False, layout="constrained")
    for axis, hit in zip(axes[:, 0], hits, strict=True):
        match = "" if hit.probability is None else f", match {hit.probability:.3f}"
        title = f"{hit.window.path}  {hit.time}  similarity {hit.similarity:.3f}{match}"
        draw_filmstrip(axis, hit.read_pixels()[0], processor, title)
    with writing(path):
        figure.savefig(path, dpi=100)
    plots.close(figure)


def print_table(hits: list[Hit], search: Search, times: dict[str, float]) -> None:
    table = Table("rank", "video", "time", "similarity", "match")
    for column in (table.columns[0], *table.columns[2:]):
        column.justify, column.no_wrap = "right", True
    table.columns[1].overflow = "fold"
    for rank, hit in enumerate(hits, 1):
        match = "" if hit.probability is None else f"{hit.probability:.3f}"
        table.add_row(str(rank), Plain(hit.window.path), hit.time, f"{hit.similarity:.3f}", match)
    Console().print(table)
    took = f"searching {times['search_ms']:.0f} ms"
    if "rerank_ms" in times:
        took += f", re-ranking {times['rerank_ms']:.0f} ms"
    print(f"{len(search.rows)} clips; {took}")
    if warning := warn_of(hits):
        print(warning)


def print_json(hits: list[Hit], search: Search, times: dict[str, float]) -> None:
    found = [
        {
            "path": hit.window.path,
            "start": hit.window.start,
            "end": hit.window.end,
            "similarity": hit.similarity,
            "match": hit.probability,
        }
        for hit in hits
    ]
    report = {"hits": found, "left_out": list(search.left_out.values()), "clips": len(search.rows), **times}
    print(json.dumps(report, indent=2))


def run(args: argparse.Namespace) -> None:
    """A command of search_videos.py. Raises `ImportError`, `OSError` or `ValueError` with what is wrong."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    check_faiss()
    {"index": index, "query": query}[args.command](args)
