"""Trains a video classifier on labelled clips, from a pretrained model or from scratch.

    accelerate launch scripts/finetune.py --data CLIPS --model MODEL --output-dir OUTPUT

CLIPS is a folder in the `videofolder` layout of `datasets` (`train/LABEL/*.mp4`, `test/LABEL/*.mp4`) or a data set on
the Hub; MODEL is a directory or a Hub id, also of an image model, which becomes a video model.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed, tqdm
from huggingface_hub.errors import StrictDataclassError
from torch.utils.data import DataLoader
from transformers import HfArgumentParser

from modeling_videomamba import VideoMambaConfig, VideoMambaForVideoClassification, VideoMambaVideoProcessor
from modeling_videomamba.training.data import LabelledVideos, load_videos
from modeling_videomamba.training.memory import keep_freed_memory
from modeling_videomamba.training.optimization import cosine_schedule, parameter_groups


@dataclass
class Arguments:
    data: str = field(metadata={"help": "folder in the videofolder layout, or Hub id"})
    output_dir: Path = field(metadata={"help": "where the model goes"})
    model: str | None = field(default=None, metadata={"help": "directory or Hub id to start from"})
    config: Path | None = field(
        default=None, metadata={"help": "configuration (JSON) of a model to train from scratch"}
    )
    num_frames: int | None = field(default=None, metadata={"help": "frames of a clip, if others than the model's"})
    epochs: int = 30
    batch_size: int = field(default=16, metadata={"help": "clips a step on each process"})
    learning_rate: float = 1e-3
    min_learning_rate: float = 1e-6
    warmup_epochs: float = 1.0
    weight_decay: float = 0.05
    max_grad_norm: float = 1.0
    num_workers: int = field(default=2, metadata={"help": "decoding processes of each process"})
    seed: int = 0


def load_model(args: Arguments, labels: list[str]) -> VideoMambaForVideoClassification:
    """The model to train, with a head for `labels`."""
    changes: dict[str, Any] = {
        "id2label": dict(enumerate(labels)),
        "label2id": {label: index for index, label in enumerate(labels)},
        "teacher_hidden_size": None,  # a distillation head gets no gradient here, which several processes don't bear
    }
    if args.config is not None:
        fields = {**json.loads(args.config.read_text("utf-8")), **changes}
        if args.num_frames is not None:
            fields["num_frames"] = args.num_frames
        return VideoMambaForVideoClassification(VideoMambaConfig(**fields))
    model = VideoMambaForVideoClassification.from_pretrained(args.model, ignore_mismatched_sizes=True, **changes)
    if model.config.num_frames is None:
        return model.inflate(args.num_frames or VideoMambaVideoProcessor.num_frames)
    return model.resize_position_embeddings(num_frames=args.num_frames)


@torch.no_grad()
def evaluate(accelerator: Accelerator, model: torch.nn.Module, loader: DataLoader) -> float:
    """Share of the clips whose class is found."""
    model.eval()
    correct = []
    for batch in loader:
        predictions = model(batch["pixel_values"]).logits.argmax(-1)
        correct.append(accelerator.gather_for_metrics(predictions == batch["labels"]))
    model.train()
    return torch.cat(correct).float().mean().item()


def main() -> None:
    (args,) = HfArgumentParser(Arguments, description=__doc__).parse_args_into_dataclasses()
    if (args.model is None) == (args.config is None):
        sys.exit("error: pass either --model or --config")
    if args.warmup_epochs > args.epochs:
        sys.exit(f"error: --warmup-epochs {args.warmup_epochs} is above --epochs {args.epochs}")
    set_seed(args.seed)
    accelerator = Accelerator()
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    try:
        splits = load_videos(args.data)
    except (OSError, ValueError) as error:
        sys.exit(f"error: --data {args.data}: {error}")
    test_split = next((name for name in ("validation", "test") if name in splits), None)
    if test_split is None or "train" not in splits:
        sys.exit(f"error: {args.data} must have the splits train and validation or test, got {', '.join(splits)}")

    try:
        model = load_model(args, splits["train"].features["label"].names)
    except (OSError, ValueError, StrictDataclassError) as error:
        sys.exit(f"error: {error}")
    processor = VideoMambaVideoProcessor.for_model(model.config)
    loaders = [
        DataLoader(
            LabelledVideos(splits[name], processor),
            batch_size=args.batch_size,
            shuffle=name == "train",
            num_workers=args.num_workers,
            persistent_workers=args.num_workers > 0,
            drop_last=name == "train",
        )
        for name in ("train", test_split)
    ]
    optimizer = torch.optim.AdamW(parameter_groups(model, args.weight_decay), lr=args.learning_rate)
    model, optimizer, train_loader, test_loader = accelerator.prepare(model, optimizer, *loaders)
    if len(train_loader) == 0:
        sys.exit(f"error: fewer training clips ({len(splits['train'])}) than one batch on each process holds")

    bar = tqdm(total=args.epochs * len(train_loader), unit="step")
    step = 0
    for epoch in range(args.epochs):
        for batch in train_loader:
            for group in optimizer.param_groups:
                group["lr"] = cosine_schedule(
                    step,
                    base=args.learning_rate,
                    final=args.min_learning_rate,
                    epochs=args.epochs,
                    steps_per_epoch=len(train_loader),
                    warmup_epochs=args.warmup_epochs,
                )
            loss = model(**batch).loss
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            bar.update()
            bar.set_postfix(loss=f"{loss.item():.3f}")
        accuracy = evaluate(accelerator, model, test_loader)
        if accelerator.is_main_process:
            bar.write(f"epoch {epoch + 1}: accuracy {accuracy:.4f} on the {test_split} split")
    bar.close()

    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(args.output_dir)
        processor.save_pretrained(args.output_dir)
        print(f"saved {args.output_dir}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
