"""Writes clips of moving handwritten digits as mp4 files, in the `videofolder` layout of `datasets`.

    python scripts/make_moving_digits.py OUTPUT_DIR

Each clip shows one of scikit-learn's 8x8 digits, enlarged, drifting over noise in one of eight directions, which is its
label. Digits that leave the frame come back on the other side: at any moment the digit is equally likely anywhere, so
that no single frame tells the direction. The test clips show digits that no training clip shows.
"""

import argparse
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
FRAME_SIZE = 64
DIGIT_SIZE = 32
NUM_FRAMES = 16
FPS = 8


def draw_clip(digit: np.ndarray, step: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Frames `(NUM_FRAMES, FRAME_SIZE, FRAME_SIZE, 3)`, uint8, of an 8x8 `digit` with values from 0 to 16."""
    picture = Image.fromarray((digit * 255 / 16).astype(np.uint8)).resize(
        (DIGIT_SIZE, DIGIT_SIZE), Image.Resampling.BILINEAR
    )
    color = rng.uniform(0.6, 1.0, size=3)
    canvas = np.zeros((FRAME_SIZE, FRAME_SIZE, 3))
    canvas[:DIGIT_SIZE, :DIGIT_SIZE] = np.asarray(picture)[..., None] * color
    start = rng.uniform(0, FRAME_SIZE, size=2)
    velocity = rng.uniform(2.0, 4.0) * np.array(step) / np.linalg.norm(step)
    noise = rng.uniform(0, 60, size=(NUM_FRAMES, FRAME_SIZE, FRAME_SIZE, 1))
    frames = [
        np.roll(canvas, np.round(start + velocity * index).astype(int), axis=(0, 1)) for index in range(NUM_FRAMES)
    ]
    return np.clip(np.stack(frames) + noise, 0, 255).astype(np.uint8)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--train-clips", type=int, default=4096, help="training clips in all (default: 4096)")
    parser.add_argument("--test-clips", type=int, default=800, help="test clips in all (default: 800)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    train_digits, test_digits = train_test_split(load_digits().images, test_size=0.25, random_state=0)
    splits = {"train": (train_digits, args.train_clips), "test": (test_digits, args.test_clips)}
    for split, (digits, num_clips) in splits.items():
        rng = np.random.default_rng([args.seed, split == "test"])
        for index in tqdm(range(num_clips), desc=split, unit="clip"):
            label = list(DIRECTIONS)[index % len(DIRECTIONS)]
            path = args.output_dir / split / label / f"{index:05}.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_mp4(path, draw_clip(digits[rng.integers(len(digits))], DIRECTIONS[label], rng))


if __name__ == "__main__":
    main()
