"""Converts a checkpoint of the original VideoMamba release to a directory for `from_pretrained`.

    python scripts/convert_checkpoint.py videomamba_t16_k400_f8_res224.pth videomamba-ti-k400 --labels kinetics400

The kind of model (image, self-distilled student, video, masked pretraining, video-text, CLIP visual encoder) and every
value of its configuration are read off the tensors, but for those that have an option here.
"""

import thread_policy  # noqa: F401 - before PyTorch is loaded

import sys
from pathlib import Path
from typing import Any

from command_line import Parser, output_folder, run_main

KNOWN_LABELS = ("imagenet-1k", "kinetics400", "something-something-v2")  # as in `load_labels`


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("input", type=Path, metavar="INPUT", help="the .pth file")
    parser.add_argument("output_dir", type=output_folder, metavar="OUTPUT_DIR", help="directory for the model")
    parser.add_argument("--labels", help=f"class names: a file, or one of {', '.join(KNOWN_LABELS)} (default: numbers)")
    parser.add_argument(
        "--alignment-interval",
        type=int,
        help="layers from one to the next that masked pretraining aligned (default: 1)",
    )
    parser.add_argument(
        "--num-attention-heads",
        type=int,
        help="heads of a CLIP visual encoder (default: one for 64 channels)",
    )
    parser.add_argument(
        "--text-num-attention-heads",
        type=int,
        help="heads of the BERT of a video-text checkpoint (default: 12)",
    )
    parser.add_argument("--tokenizer", help="directory or Hub id, saved with a video-text model (default: none)")
    parser.add_argument(
        "--clip-teacher",
        type=output_folder,
        help="directory for the CLIP of a video-text checkpoint (default: left out)",
    )
    args = parser.parse_args()
    from modeling_videomamba.conversion import convert_checkpoint
    from modeling_videomamba.labels import load_labels
    from modeling_videomamba.training.names import check_name

    try:
        labels = None if args.labels is None else load_labels(args.labels)
        converted = convert_checkpoint(
            args.input,
            labels,
            alignment_interval=args.alignment_interval,
            num_attention_heads=args.num_attention_heads,
            text_num_attention_heads=args.text_num_attention_heads,
        )
        teacher = converted.teacher
        if args.clip_teacher is not None and teacher is None:
            sys.exit(f"error: {args.input} contains no CLIP for --clip-teacher")
        if args.tokenizer is not None:
            check_name(args.tokenizer)
            converted.add_tokenizer(args.tokenizer)
        save(converted, args.input, args.output_dir)
        if args.clip_teacher is not None and teacher is not None:
            save(teacher, args.input, args.clip_teacher)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    if args.clip_teacher is None and teacher is not None:
        print("its CLIP teacher is left out; --clip-teacher saves it")


def save(converted: Any, source: Path, directory: Path) -> None:
    from modeling_videomamba.training.output import replace_files

    replace_files(directory, converted.save_pretrained)
    tensors = converted.model.state_dict()
    parameters = sum(parameter.numel() for parameter in converted.model.parameters())
    print(f"{source}: {converted.kind} checkpoint, {parameters:,} parameters, all {len(tensors)} tensors used")
    print(f"{directory}: {type(converted.model).__name__}, {type(converted.processor).__name__}")


if __name__ == "__main__":
    run_main(main)
