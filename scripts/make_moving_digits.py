"""Writes clips of moving handwritten digits as mp4 files, with labels or with captions.

    python scripts/make_moving_digits.py OUTPUT_DIR [--captions]

Each clip shows one of scikit-learn's 8x8 digits, enlarged, drifting over noise in one of eight directions, which is its
label, in the `videofolder` layout of `datasets`. Digits that leave the frame come back on the other side: at any moment
the digit is equally likely anywhere, so that no single frame tells the direction. The test clips show digits that no
training clip shows.

With --captions, train.jsonl and test.jsonl have a caption for each clip, such as "a red seven moves up and to the left,
fast, over gray". No test clip has a caption that another test clip or a training clip has.
"""

import thread_policy  # noqa: F401 - before PyTorch is loaded

import sys

from command_line import Parser, output_folder, run_main

NUM_HELD_OUT = 512  # captions, of 1920


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("output_dir", type=output_folder, metavar="OUTPUT_DIR", help="folder for the clips")
    parser.add_argument("--captions", action="store_true", help="instead of labels")
    parser.add_argument("--train-clips", type=int, default=4096, help="training clips in all")
    parser.add_argument("--test-clips", type=int, help=f"test clips in all (default: 800, or {NUM_HELD_OUT} captions)")
    parser.add_argument("--seed", type=int, default=0, help="decides every clip")
    args = parser.parse_args()
    for name in ("train_clips", "test_clips", "seed"):
        value = getattr(args, name)
        if value is not None and value < 0:
            parser.error(f"--{name.replace('_', '-')} must not be negative, got {value}")
    if args.test_clips is None:
        args.test_clips = NUM_HELD_OUT if args.captions else 800
    if args.captions and args.test_clips > NUM_HELD_OUT:
        parser.error(f"--test-clips must be at most {NUM_HELD_OUT} with --captions, got {args.test_clips}")

    from moving_digits import write_clips

    try:
        write_clips(args)
    except OSError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    run_main(main)
