"""Writes the recipes of the training scripts from the hyper-parameters of the released runs.

    python scripts/make_recipes.py PUBLISHED.json

PUBLISHED.json has the arguments of the original programs (`tests/golden/recipes.json`). Each recipe gives them under
our names and says, in its first lines, what to start from and on how many GPUs the run was made; learning rates are
scaled to the batch of the run at hand. Those of pretrain_umt.py and of pretrain_video_text.py are in folders of their
own, `umt` and `video-text`.
"""

import thread_policy  # noqa: F401 - before PyTorch is loaded

import json
import re
import sys
from pathlib import Path
from typing import Any

import yaml

from command_line import Parser, run_main

FOLDER = Path(__file__).parent / "recipes"
DEFAULT_GPUS = 8
REPEATS = 3  # views of an image in the repeated augmentation of DeiT
IMAGE_BASE, VIDEO_BASE = 512, 256  # batches that the learning rates are for
PROGRAMS = {
    "main.py": "image",
    "run_with_submitit.py": "image",
    "run_with_submitit_distill.py": "image",
    "run_class_finetuning.py": "video",
    "run_regression_finetuning.py": "video",
    "run_videomamba_pretraining.py": "umt",
}
CLIP_MODELS = {"clip_b16": "CLIP B/16, openai/clip-vit-base-patch16"}
CROP_AREA = 0.66**2  # the smallest of the original's crops
VIDEO_TEXT_CROP_AREA = 0.5
VIDEO_TEXT_GPUS = {"5m": 16, "17m": 32, "25m": 32}  # as the original's launchers have it, whose files don't name them
# Fields of these runs contradict the runs that they belong to: the size by their folder, and the frames by their name.
# Masked pretraining has an epoch more in its files than in the paper, for the sake of a last checkpoint.
MISTAKES: dict[str, dict[str, Any]] = {
    "video_sm/k400/videomamba_middle_mask/mask_pretrain": {"epochs": "800"},
    "video_sm/ssv2/videomamba_middle_mask/mask_pretrain": {"epochs": "800"},
    "video_sm/k400/videomamba_tiny/f64x224to384": {"model": "videomamba_tiny"},
    "video_sm/ssv2/videomamba_tiny/f16x224to288": {"model": "videomamba_tiny", "num_frames": "16"},
}


def recipe_name(run: str) -> str:
    """`k400-mask-middle-f8x224` for `video_sm/k400/videomamba_middle_mask/f8x224`."""
    _, *parts = run.split("/")
    if parts[-1] == "mask_pretrain":
        return f"umt/{parts[0]}-middle-f8x224"
    name = "-".join(parts).replace("exp_distill-", "distilled-")
    name = re.sub(r"videomamba_(\w+?)_mask", r"mask-\1", name).replace("videomamba_", "").replace("_", "-")
    return name if run.startswith("video") else f"in1k-{name}"


def augmentation(args: dict[str, Any], data: str) -> dict[str, Any]:
    """Augmentation under our names."""
    values: dict[str, Any] = {
        "flip": args.get("data_set") != "SSV2" and "ssv2" not in data,
        "min_crop_area": 0.08,
        "random_erasing": args["reprob"],
        "mixup": args["mixup"],
        "cutmix": args["cutmix"],
        "label_smoothing": args["smoothing"],
    }
    if args["aa"] == "v0":
        return {**values, "auto_augment": True}
    found = re.fullmatch(r"rand-m(\d+)(?:-n(\d+))?-mstd([\d.]+)-inc1", args["aa"])
    if found is None:
        raise ValueError(f"unknown augmentation {args['aa']}")
    magnitude, ops, std = found.groups()
    names = ("rand_augment_ops", "rand_augment_magnitude", "rand_augment_std")
    return values | dict(zip(names, (int(ops or 2), float(magnitude), float(std)), strict=True))


def optimization(args: dict[str, Any]) -> dict[str, Any]:
    """Optimiser and schedule under our names."""
    values: dict[str, Any] = {
        "epochs": float(args["epochs"]),
        "batch_size": int(args["batch_size"]),
        "learning_rate": float(args["lr"]),
        "min_learning_rate": float(args["min_lr"]),
        "warmup_learning_rate": float(args["warmup_lr"]),
        "warmup_epochs": float(args["warmup_epochs"]),
        "weight_decay": float(args["weight_decay"]),
        "adam_beta2": float(str(args.get("opt_betas") or "0.9 0.999").split()[1]),
        "mixed_precision": "bf16" if args["bf16"] else "no",
    }
    if args.get("clip_grad") is not None:
        values["max_grad_norm"] = float(args["clip_grad"])
    if int(args.get("update_freq", 1)) > 1:
        values["gradient_accumulation_steps"] = int(args["update_freq"])
    return values


def image_recipe(args: dict[str, Any]) -> dict[str, Any]:
    """Our repeated augmentation shows all views of an image in one step, so that an epoch has more of them."""
    values = {"image_size": int(args["input_size"]), "drop_path_rate": float(args["drop_path"])}
    values |= {**augmentation(args, ""), **optimization(args), "base_batch_size": IMAGE_BASE}
    scale = int(args.get("gpus", DEFAULT_GPUS)) * values["batch_size"] / IMAGE_BASE
    for name in ("min_learning_rate", "warmup_learning_rate"):
        values[name] /= scale  # the original scales the highest only
    if not args.get("no_repeated_aug"):
        values |= {"num_sample": REPEATS, "batch_size": -(-values["batch_size"] // REPEATS)}
        values["epochs"] /= REPEATS
        values["warmup_epochs"] /= REPEATS
    return values


def video_recipe(run: str, args: dict[str, Any]) -> dict[str, Any]:
    """A run on videos."""
    values: dict[str, Any] = {
        "num_frames": int(args["num_frames"]),
        "image_size": int(args["input_size"]),
        "tubelet_size": int(args["tubelet_size"]),
        "drop_path_rate": float(args["drop_path"]),
        "num_sample": int(args["num_sample"]),
    }
    values |= {**augmentation(args, run), **optimization(args), "base_batch_size": VIDEO_BASE}
    # without its argument the original decays by 0.75, which had no effect in its code
    values["layer_decay"] = float(args["layer_decay"]) if "layer_decay" in args else 1.0
    if "regression" in run:
        values["regression"] = True
    if "trim" in run:
        values |= {"clip_seconds": float(args["trimmed"]), "clip_stride_seconds": float(args["time_stride"])}
    return values


def pretraining_recipe(args: dict[str, Any]) -> dict[str, Any]:
    """Masked pretraining. The original's warm-up begins at zero, whatever its argument says."""
    values: dict[str, Any] = {
        "size": "middle",
        "num_frames": int(args["num_frames"]),
        "tubelet_size": int(args["tubelet_size"]),
        "image_size": int(args["input_size"]),
        "drop_path_rate": float(args["drop_path"]),
        "mask_type": args["mask_type"],
        "mask_ratio": float(args["mask_ratio"]),
        "alignment_loss": args["clip_loss_type"],
        "num_aligned_layers": int(args["clip_return_layer"]),
        "alignment_interval": int(args["clip_return_interval"]),
        "flip": args["flip"] == "True",
        "min_crop_area": round(CROP_AREA, 4),
    }
    return {**values, **optimization({**args, "warmup_lr": 0}), "base_batch_size": VIDEO_BASE}


def video_text_recipe(corpus: str, args: dict[str, Any]) -> dict[str, Any]:
    """Pretraining on videos and texts, on a corpus of so many pairs. Its warm-up begins at zero."""
    values: dict[str, Any] = {
        "num_frames": args["num_frames"],
        "image_size": 224,
        "drop_path_rate": args["drop_path_rate"],
        "max_text_length": args["max_text_length"],
        "mlm_probability": args["mlm_probability"],
    }
    for kind in ("video", "image"):
        if args[f"{kind}_mask_type"] != "none":
            names = (f"{kind}_mask_type", f"{kind}_mask_ratio")
            values |= {name: args[name] for name in names}
    return values | {
        "flip": True,
        "min_crop_area": VIDEO_TEXT_CROP_AREA,
        "epochs": args["epochs"],
        "batch_size": args["batch_size_per_gpu"],
        "learning_rate": args["learning_rate"],
        "min_learning_rate": round(args["learning_rate"] * args["min_lr_multiplier"], 10),
        "warmup_learning_rate": 0.0,
        "warmup_epochs": args["warmup_epochs"],
        "weight_decay": args["weight_decay"],
        "mixed_precision": "bf16",
        "gradient_checkpointing": True,
        "base_batch_size": args["batch_size_per_gpu"] * VIDEO_TEXT_GPUS[corpus],
    }


def make_video_text_recipes(published: dict[str, Any]) -> dict[str, str]:
    """Text of each recipe of pretrain_video_text.py by its name."""
    recipes = {}
    for run, args in published["video_text"].items():
        found = re.fullmatch(r"exp_pt/videomamba_middle_(\d+m)(_unmasked)?", run)
        if found is None:
            continue  # an evaluation
        corpus, unmasked = found[1], bool(found[2])
        start = "--vision MODEL, VideoMamba middle after masked pretraining, --text google-bert/bert-base-uncased"
        start += f"; --teacher MODEL, {CLIP_MODELS['clip_b16']}"
        if unmasked:
            start = f"--model MODEL, what the recipe {corpus} has left"
        head = f"# {run} of the released runs, {VIDEO_TEXT_GPUS[corpus]} GPUs.\n# Start: {start}.\n"
        values = yaml.safe_dump(video_text_recipe(corpus, args), sort_keys=False)
        recipes[f"video-text/{corpus}{'-unmasked' if unmasked else ''}"] = head + values
    return recipes


def describe(run: str, args: dict[str, Any]) -> str:
    """The comment at the head of a recipe."""
    size = str(args["model"]).removeprefix("videomamba_")
    if run.endswith("mask_pretrain"):
        start = f"from scratch; --teacher MODEL, {CLIP_MODELS[args['clip_teacher']]}"
    elif run.startswith("image"):
        start = f"--model MODEL, VideoMamba {size} trained at {448 if int(args['input_size']) == 576 else 224}"
        if int(args["input_size"]) == 224:
            start = "from scratch"
            if "teacher_model" in args and "distill" in run:
                start += f"; distill.py, --teacher {args['teacher_model']} trained on ImageNet-1k"
    elif "to" in run.rsplit("/", 1)[1]:
        start = f"--model MODEL, VideoMamba {size} trained at 224"
    elif re.search("breakfast|coin|lvu", run):
        start = f"--model MODEL, VideoMamba {size} trained on Kinetics-400"
        start += ", after masked pretraining" if "_mask" in run else ""
    elif "_mask" in run:
        start = f"--model MODEL, VideoMamba {size} after masked pretraining"
    else:
        start = f"--model MODEL, VideoMamba {size} trained on ImageNet-1k"
    gpus = f"{args['gpus']} GPUs" if "gpus" in args else f"taken as {DEFAULT_GPUS} GPUs, which is not published"
    lines = [f"{run} of the released runs, {gpus}.", f"Start: {start}."]
    if "test_num_segment" in args and run.startswith("video"):
        lines.append(f"Test: --num-clips {args['test_num_segment']} --num-crops {args['test_num_crop']}.")
    return "".join(f"# {line}\n" for line in lines)


def make_recipes(published: dict[str, Any]) -> dict[str, str]:
    """Text of every recipe by its name, `umt/...` for those of masked pretraining, `video-text/...` for retrieval."""
    recipes = make_video_text_recipes(published)
    for run, entry in published["runs"].items():
        program = "main.py" if entry["program"] == "run_with_submitit.py" else entry["program"]
        defaults = dict(published["defaults"][program])
        defaults.pop("layer_decay", None)
        args = {**defaults, **entry["args"], **MISTAKES.get(run, {})}
        if PROGRAMS[entry["program"]] == "umt":
            values = pretraining_recipe(args)
        elif PROGRAMS[entry["program"]] == "image":
            values = image_recipe(args)
            if int(args["input_size"]) == 224:
                values = {"size": str(args["model"]).removeprefix("videomamba_"), **values}
        else:
            values = video_recipe(run, args)
        recipes[recipe_name(run)] = describe(run, args) + yaml.safe_dump(values, sort_keys=False)
    return recipes


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("published", type=Path, metavar="PUBLISHED.json", help="arguments of the original programs")
    args = parser.parse_args()
    try:
        published = json.loads(args.published.read_text("utf-8"))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {args.published}: {error}")
    for folder in ("umt", "video-text"):
        (FOLDER / folder).mkdir(parents=True, exist_ok=True)
    for name, text in make_recipes(published).items():
        (FOLDER / f"{name}.yaml").write_text(text, "utf-8")


if __name__ == "__main__":
    run_main(main)
