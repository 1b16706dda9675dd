"""Clips of moving handwritten digits, with labels or with captions, as make_moving_digits.py writes them."""

import argparse
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm.auto import tqdm

# Names and steps (down, right). Sorted by name they are in the order of the class indices of `videofolder`.
DIRECTIONS = {
    "down": (1, 0),
    "down-left": (1, -1),
    "down-right": (1, 1),
    "left": (0, -1),
    "right": (0, 1),
    "up": (-1, 0),
    "up-left": (-1, -1),
    "up-right": (-1, 1),
}
COLORS = {"red": (1.0, 0.25, 0.25), "green": (0.25, 1.0, 0.25), "blue": (0.35, 0.45, 1.0), "white": (1.0, 1.0, 1.0)}
GROUNDS = {"gray": (1.0, 1.0, 1.0), "brown": (1.2, 0.8, 0.0), "purple": (1.2, 0.0, 1.2)}
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SPEEDS = {"slowly": (1.0, 1.5), "fast": (3.0, 4.0)}  # pixels of a frame
NUM_HELD_OUT = 512  # captions, of 1920
FRAME_SIZE = 64
DIGIT_SIZE = 32
NUM_FRAMES = 16
FPS = 8


def draw_clip(
    digit: np.ndarray,
    step: tuple[int, int],
    rng: np.random.Generator,
    color: tuple[float, float, float] | None = None,
    speeds: tuple[float, float] = (2.0, 4.0),
    ground: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> np.ndarray:
    """
    Frames `(NUM_FRAMES, FRAME_SIZE, FRAME_SIZE, 3)`, uint8, of an 8x8 `digit` with values from 0 to 16, in a `color`
    (RGB from 0 to 1) or any bright one, at a speed between two, in pixels of a frame, over noise whose colours have the
    strengths `ground`.
    """
    picture = Image.fromarray((digit * 255 / 16).astype(np.uint8)).resize(
        (DIGIT_SIZE, DIGIT_SIZE), Image.Resampling.BILINEAR
    )
    paint = rng.uniform(0.6, 1.0, size=3) if color is None else np.array(color)
    canvas = np.zeros((FRAME_SIZE, FRAME_SIZE, 3))
    canvas[:DIGIT_SIZE, :DIGIT_SIZE] = np.asarray(picture)[..., None] * paint
    start = rng.uniform(0, FRAME_SIZE, size=2)
    velocity = rng.uniform(*speeds) * np.array(step) / np.linalg.norm(step)
    noise = rng.uniform(0, 60, size=(NUM_FRAMES, FRAME_SIZE, FRAME_SIZE, 1))
    frames = [
        np.roll(canvas, np.round(start + velocity * index).astype(int), axis=(0, 1)) for index in range(NUM_FRAMES)
    ]
    return np.clip(np.stack(frames) + noise * np.array(ground), 0, 255).astype(np.uint8)


def write_mp4(path: Path, frames: np.ndarray) -> None:
    """Writes RGB frames `(frames, height, width, 3)`, uint8, as H.264, the same file each time."""
    # with macroblock trees, x264 makes another file of the same frames now and then
    options = {"crf": "20", "preset": "veryfast", "x264-params": "no-mbtree=1"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options=options)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def write_labelled(folder: Path, digits: np.ndarray, num_clips: int, rng: np.random.Generator) -> None:
    """Clips in a folder of each direction."""
    for index in tqdm(range(num_clips), desc=folder.name, unit="clip"):
        label = list(DIRECTIONS)[index % len(DIRECTIONS)]
        path = folder / label / f"{index:05}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_mp4(path, draw_clip(digits[rng.integers(len(digits))], DIRECTIONS[label], rng))


def captions() -> list[tuple[str, int, str, str, str]]:
    """Colour, digit, direction, speed and ground of all captions, in an order of their own."""
    found = list(itertools.product(COLORS, range(len(NUMBERS)), DIRECTIONS, SPEEDS, GROUNDS))
    return [found[index] for index in np.random.default_rng(0).permutation(len(found))]


def caption(color: str, number: int, direction: str, speed: str, ground: str) -> str:
    """A sentence."""
    vertical, _, horizontal = direction.rpartition("-") if direction not in ("up", "down") else (direction, "", "")
    way = " and ".join(part for part in (vertical, horizontal and f"to the {horizontal}") if part)
    return f"a {color} {NUMBERS[number]} moves {way}, {speed}, over {ground}"


def write_captioned(
    folder: Path,
    digits: dict[int, np.ndarray],
    chosen: Iterator[tuple[str, int, str, str, str]],
    rng: np.random.Generator,
) -> None:
    """Clips in a folder, and their captions in a list beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".jsonl").open("w", encoding="utf-8") as file:
        for index, (color, number, direction, speed, ground) in enumerate(tqdm(chosen, desc=folder.name, unit="clip")):
            digit = digits[number][rng.integers(len(digits[number]))]
            path = folder / f"{index:05}.mp4"
            frames = draw_clip(digit, DIRECTIONS[direction], rng, COLORS[color], SPEEDS[speed], GROUNDS[ground])
            write_mp4(path, frames)
            text = caption(color, number, direction, speed, ground)
            file.write(json.dumps({"path": f"{folder.name}/{path.name}", "caption": text}) + "\n")


def write_clips(args: argparse.Namespace) -> None:
    """Training and test clips. `args` are the arguments of make_moving_digits.py."""
    data = load_digits()
    train_digits, test_digits, train_numbers, test_numbers = train_test_split(
        data.images, data.target, test_size=0.25, random_state=0
    )
    splits = {
        "train": (train_digits, train_numbers, args.train_clips),
        "test": (test_digits, test_numbers, args.test_clips),
    }
    for split, (digits, numbers, num_clips) in splits.items():
        rng, folder = np.random.default_rng([args.seed, split == "test"]), args.output_dir / split
        if not args.captions:
            write_labelled(folder, digits, num_clips, rng)
            continue
        kept = captions()[:NUM_HELD_OUT] if split == "test" else captions()[NUM_HELD_OUT:]
        by_number = {number: digits[numbers == number] for number in range(len(NUMBERS))}
        write_captioned(folder, by_number, itertools.islice(itertools.cycle(kept), num_clips), rng)
