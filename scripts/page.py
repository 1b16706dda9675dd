"""The page of app.py: labels of videos and, given an index, videos found by a text."""

import argparse
import base64
import io
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import datasets
import gradio as gr
import torch
from huggingface_hub import SpaceCard
from torchvision.transforms.v2.functional import to_pil_image
from transformers import AutoModelForVideoClassification, AutoVideoProcessor, VideoClassificationPipeline, logging

from modeling_videomamba import VideoMambaVideoProcessor
from modeling_videomamba.training.data import BROKEN
from modeling_videomamba.training.guarded_video import GuardedVideo
from modeling_videomamba.training.loading import load_model, load_pretrained
from modeling_videomamba.training.plots import restore_pixels
from modeling_videomamba.training.previews import clock_time, write_preview
from modeling_videomamba.training.search import Hit, OpenVideo, Search, Text, find, load_search, warn_of
from modeling_videomamba.training.windows import VideoWindow, prepare_frames
from modeling_videomamba.video_processing_videomamba import sample_frame_indices

HERE = Path(__file__).resolve().parent
NANO = HERE.parent / "hub_cards" / "videomamba-nano"
CARD = "README.md"

MAX_MEGABYTES = 200
MAX_MINUTES = 10
MIN_SIDE, MAX_SIDE = 16, 4096  # pixels
MAX_SECONDS = 60  # to read and decode
MAX_MEMORY = 2**29  # bytes, to read and decode
MAX_CHARACTERS = 1000
MAX_WAITING = 20
LIMITS = (
    f"A video of at most {MAX_MEGABYTES} MB and {MAX_MINUTES} minutes, of {MIN_SIDE} to {MAX_SIDE} pixels a side, "
    f"which can be read in {MAX_SECONDS} s and {MAX_MEMORY >> 20} MB of memory."
)

TOP_LABELS = 5
TOP_HITS = 10
FRAMES_OF_HIT = 8

# of its other weights Gradio's files have no Latin letters
FONT = gr.themes.LocalFont("Source Sans Pro", weights=(400, 700))
CSS = """
.gradio-container { width: 100%; max-width: 1100px !important; margin: 0 auto !important; }
.html-container { padding: 0 !important; }
#video video { max-height: 320px; }
.frames { display: grid; grid-template-columns: repeat(8, 1fr); gap: 4px; }
.frames img { width: 100%; display: block; border-radius: 4px; margin: 0; }
.message { padding: 12px 16px; border-left: 4px solid #dc2626; background: #dc26261a; overflow-wrap: anywhere; }
.hit { margin: 0 0 20px; }
.hit figcaption, .facts { margin: 0 0 8px; overflow-wrap: anywhere; }
@media (max-width: 600px) { .frames { grid-template-columns: repeat(4, 1fr); } }
"""


# Videos


def check_size(name: str, path: Path) -> None:
    """Raises `ValueError` for a file that is too large."""
    megabytes = path.stat().st_size / 2**20
    if megabytes > MAX_MEGABYTES:
        raise ValueError(f"{name}: too large, {megabytes:.0f} MB. {LIMITS}")


def check_video(video: GuardedVideo) -> None:
    """Raises `ValueError` for a video that is too long or whose frames are too large."""
    minutes = video.seconds / 60
    if minutes > MAX_MINUTES:
        raise ValueError(f"{video.name}: too long, {clock_time(video.seconds)}. {LIMITS}")
    check_sides(video.name, video.width, video.height)


def check_sides(name: str, width: int, height: int) -> None:
    if max(width, height) > MAX_SIDE:
        raise ValueError(f"{name}: too large, {width} x {height} pixels. {LIMITS}")


def check_frames(video: GuardedVideo, first: int) -> tuple[int, int]:
    """
    Width and height of the upright frames, which can be other than the file states. Raises `ValueError` as
    [`check_video`], and for very thin frames, which are enlarged to many pixels.
    """
    (frame,) = video.decode([first])
    height, width = frame.shape[:2]
    check_sides(video.name, width, height)
    if min(width, height) < MIN_SIDE:
        raise ValueError(f"{video.name}: too small, {width} x {height} pixels. {LIMITS}")
    return width, height


def read_video(name: str, path: Path, processor: VideoMambaVideoProcessor) -> tuple[torch.Tensor, str]:
    r"""
    What the model sees of a video, and what is in the file.

    Args:
        name (`str`): Name of the file in errors.
        path (`Path`): Path of the file.
        processor ([`VideoMambaVideoProcessor`]): Processor of the model.

    Returns:
        `tuple[torch.Tensor, str]`: `(1, frames, 3, height, width)` and a line of text.

    Raises:
        `ValueError`: if it is beyond the limits, or no video, with the name and the reason.
        `TimeoutError`: if that takes too long.
        `OSError`: if there is no such file, or it can't be read.
    """
    check_size(name, path)
    limits = {"max_pixels": MAX_SIDE**2, "max_seconds": MAX_SECONDS, "max_memory": MAX_MEMORY}
    with GuardedVideo(name, path, **limits) as video:
        check_video(video)
        indices = sample_frame_indices(video.num_frames, processor.num_frames).flatten()
        width, height = check_frames(video, int(indices[0]))
        pixels = prepare_frames(video.decode(indices.tolist()), processor)
        rate = f", {video.num_frames / video.seconds:.3g} a second" if video.seconds else ""
        return pixels, f"{video.num_frames} frames{rate}, {video.seconds:.1f} s, {width} x {height} pixels"


# What is shown


def show_message(text: str) -> str:
    return f'<div class="message" role="alert">{escape(text)}</div>'


def show_frames(pixel_values: torch.Tensor, processor: VideoMambaVideoProcessor) -> str:
    """The frames of `(1, frames, 3, height, width)` as the model sees them."""
    images = []
    for frame in restore_pixels(pixel_values, processor)[0]:
        file = io.BytesIO()
        to_pil_image(frame).save(file, "JPEG", quality=90)
        data = base64.b64encode(file.getvalue()).decode()
        images.append(f'<img alt="frame" src="data:image/jpeg;base64,{data}">')
    return f'<div class="frames">{"".join(images)}</div>'


def show_hit(hit: Hit, processor: VideoMambaVideoProcessor) -> str:
    pixels = hit.read_pixels()
    shown = torch.linspace(0, pixels.shape[1] - 1, min(pixels.shape[1], FRAMES_OF_HIT)).round().long()
    match = "" if hit.probability is None else f", match {hit.probability:.3f}"
    caption = f"<b>{escape(hit.window.path)}</b> {hit.time}, similarity {hit.similarity:.3f}{match}"
    frames = show_frames(pixels[:, shown], processor)
    return f'<figure class="hit"><figcaption>{caption}</figcaption>{frames}</figure>'


# What the buttons do


@torch.inference_mode()
def classify(
    classifier: VideoClassificationPipeline, file: dict[str, Any] | None
) -> tuple[str, dict[str, float] | None, str]:
    r"""
    The top labels of a video.

    Args:
        classifier (`VideoClassificationPipeline`): With the model.
        file (`dict`, *optional*): `path` of an uploaded file, and `orig_name`, which the user knows it by.

    Returns:
        `tuple[str, dict[str, float] | None, str]`: a message if something is wrong, else the scores of the labels, and
        what the video is, how long it took and the frames.
    """
    if file is None:
        return show_message(f"There is no video: upload or record one, or pick an example. {LIMITS}"), None, ""
    name = file.get("orig_name") or Path(file["path"]).name
    began = time.perf_counter()
    try:
        pixels, contents = read_video(name, Path(file["path"]), classifier.video_processor)
    except (TimeoutError, ValueError) as error:
        return show_message(str(error)), None, ""
    except OSError:  # whose text has the path on the server
        return show_message(f"{name}: can't be read, upload it again"), None, ""
    read = time.perf_counter()
    top = classifier.postprocess(classifier.forward({"pixel_values": pixels}), top_k=TOP_LABELS)
    ended = time.perf_counter()
    facts = (
        f"<b>{escape(name)}</b>: {contents}<br>"
        f"Reading and preparing {1000 * (read - began):.0f} ms, model {1000 * (ended - read):.0f} ms"
    )
    frames = show_frames(pixels, classifier.video_processor)
    return "", {item["label"]: item["score"] for item in top}, f'<p class="facts">{facts}</p>{frames}'


@torch.inference_mode()
def search_videos(search: Search, model: Any, processor: Any, text: str) -> tuple[str, list[Hit]]:
    """What is found for a text, or a message, and the hits."""
    if len(text) > MAX_CHARACTERS:
        return show_message(f"The text has {len(text):,} characters, at most {MAX_CHARACTERS:,} are read."), []
    began = time.perf_counter()
    try:
        hits, _ = find(search, Text(text, model, processor), TOP_HITS, with_pixels=True)
    except ValueError as error:
        return show_message(str(error)), []
    lines = [f"<p>{len(search.rows)} clips searched in {1000 * (time.perf_counter() - began):.0f} ms</p>"]
    if search.left_out:
        lines.append(f"<p>Left out, as changed or unreadable since they were indexed: {len(search.left_out)}</p>")
    if warning := warn_of(hits):
        lines.append(show_message(f"{warning[0].upper()}{warning[1:]}."))
    return "".join(lines + [show_hit(hit, processor.video_processor) for hit in hits]), hits


def offer(search: Search, model: Any, processor: Any, text: str) -> tuple[str, gr.Radio, None, list[VideoWindow]]:
    """What is found for a text, which hits can be played, an empty player, and the windows of the hits."""
    shown, hits = search_videos(search, model, processor, text)
    choices = [(f"{rank}. {hit.window.path} {hit.time}", rank - 1) for rank, hit in enumerate(hits, 1)]
    return shown, gr.Radio(choices, value=None, visible=bool(hits)), None, [hit.window for hit in hits]


def play(search: Search, windows: list[VideoWindow], chosen: int) -> Iterator[gr.Video]:
    """A hit for the player. Raises `gr.Error`, which the page shows, for a file that has changed or can't be read."""
    window = windows[chosen]
    if search.change(window) == "changed":  # after it was found
        raise gr.Error(f"{window.file.path}: changed since it was indexed")
    with tempfile.TemporaryDirectory() as folder:  # until Gradio has taken the file from it
        path = Path(folder, "hit.mp4")
        try:
            with OpenVideo(search) as opened:
                write_preview(opened.of(window), window.start, window.end, path)
        except BROKEN as error:
            raise gr.Error(str(error)) from error
        yield gr.Video(str(path), visible=True)


# The page


def refuse_addresses(video: gr.Video) -> None:
    """For who calls the page by its API, Gradio would download what is at an address, however large it is."""
    move = video.async_move_resource_to_block_cache

    async def move_upload(url_or_file_path: str | Path | None) -> str | None:
        if "://" in str(url_or_file_path):
            raise ValueError("a video must be uploaded, an address is not read")
        return await move(url_or_file_path)

    # a subclass would have Gradio write a file beside this one
    video.async_move_resource_to_block_cache = move_upload  # type: ignore[method-assign]


def build_page(name: str, classifier: VideoClassificationPipeline, index: tuple[Search, Any, Any] | None) -> gr.Blocks:
    """The page for a model called `name`, with a tab for the search of [`load_search`] if there is one."""
    # what is uploaded is deleted after an hour
    with gr.Blocks(title="VideoMamba", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown("# VideoMamba")
        with gr.Tab("Classify"):
            build_classify_tab(name, classifier)
        if index is not None:
            with gr.Tab("Search"):
                build_search_tab(*index)
    return page.queue(max_size=MAX_WAITING)


def build_classify_tab(name: str, classifier: VideoClassificationPipeline) -> None:
    with gr.Row():
        with gr.Column():
            # in its own format, as changing it takes an FFmpeg of the system
            video = gr.Video(label="Video", sources=["upload", "webcam"], elem_id="video")
            refuse_addresses(video)
            gr.Markdown(LIMITS)
            button = gr.Button("Classify", variant="primary")
            message = gr.HTML(elem_id="message")
            if examples := find_examples(name):
                gr.Examples([[str(path)] for path in examples], [video], cache_examples=False)
        with gr.Column():
            labels = gr.Label(label=f"Labels by {shown_name(name)}", num_top_classes=TOP_LABELS, elem_id="labels")
            details = gr.HTML(elem_id="details")
    # without `preprocess` the name that the user knows the file by is kept
    button.click(
        partial(classify, classifier),
        video,
        [message, labels, details],
        preprocess=False,
        show_progress_on=labels,
        concurrency_limit=1,
        concurrency_id="model",
        api_name="classify",
    )


def shown_name(model: str) -> str:
    """A model's name for people: of what a run leaves, `best` says less than the folder of the run."""
    path = Path(model).resolve()
    return f"{path.parent.name}/{path.name}" if path.is_dir() and path.name in ("best", "last") else path.name


def find_examples(model: str) -> list[Path]:
    return sorted((Path(model) if Path(model).is_dir() else HERE).glob("*.mp4"))


def build_search_tab(search: Search, model: Any, processor: Any) -> None:
    text = gr.Textbox(label="What the videos show", max_lines=1, elem_id="text")
    button = gr.Button("Search", variant="primary")
    choice = gr.Radio(label="Play a hit (without sound)", visible=False, elem_id="choice")
    player = gr.Video(label="Hit", visible=False, autoplay=True, elem_id="player")
    hits, windows = gr.HTML(elem_id="hits"), gr.State([])
    gr.on(
        [button.click, text.submit],
        partial(offer, search, model, processor),
        text,
        [hits, choice, player, windows],
        concurrency_limit=1,
        concurrency_id="model",
        api_name="search",
    )
    choice.input(partial(play, search), [windows, choice], player, concurrency_limit=1, api_visibility="private")


def load_classifier(name: str) -> VideoClassificationPipeline:
    """A model with its processor. Raises `OSError` or `ValueError` where there is none that gives labels to videos."""
    processor = load_pretrained(AutoVideoProcessor, name)
    if not isinstance(processor, VideoMambaVideoProcessor):
        raise ValueError(f"{name} is not a VideoMamba for videos")
    model = load_model(AutoModelForVideoClassification, name)
    if model.config.problem_type == "regression":
        raise ValueError(f"{name} gives values, not labels")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return VideoClassificationPipeline(model=model.eval(), video_processor=processor, device=device)


def default_model() -> str:
    card = HERE / CARD
    models = SpaceCard.load(card).data.models if card.exists() else None
    return models[0] if models else str(NANO)


def serve(args: argparse.Namespace) -> None:
    """
    Shows the page until it is interrupted. `args` are those of app.py. Raises `ImportError`, `OSError` or `ValueError`
    with what is wrong.
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    name = args.model or default_model()
    index = None if args.index is None else load_search(args.index, "embedding")
    build_page(name, load_classifier(name), index).launch(
        server_name=args.host,  # without them Gradio listens where a Space asks it to, else on this machine alone
        server_port=args.port,
        share=False,
        max_file_size=MAX_MEGABYTES * 2**20,
        enable_monitoring=False,
        run_history=False,
        footer_links=[],
        css=CSS,
        theme=gr.themes.Default(font=[FONT, "sans-serif"]),
    )
