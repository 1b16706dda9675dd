"""Masked pretraining against a CLIP teacher (UMT; paper, section 3.3): from arguments to a published model."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, send_to_device
from torch import nn
from transformers.modeling_utils import PreTrainedModel

from videomamba_arguments import ModelArguments, PretrainingArguments

from ..modeling_videomamba_pretraining import alignment_loss, take_visible
from .data import EvaluationViews, TrainingViews, cut_into_windows, derive_seed, spread
from .diagnosis import NothingReadError
from .evaluation import Predictions, predict
from .loop import Batch
from .masks import draw_noise, make_masks, token_grid
from .models import load_pretraining_model
from .pictures import Picture, draw_alignment
from .plots import restore_pixels
from .probing import probe_accuracy, probe_features
from .run import Arguments, TrainingRun
from .sources import EVALUATION_SPLITS, Split, find_evaluation_split, load_split, media_kind, split_names
from .teacher import load_teacher, teacher_config
from .teacher_cache import TeacherCache, digest

NUM_PICTURES = 4
CARD_USE = """
from transformers import AutoModelFor{kind}Classification

# a head for your labels is fresh: train it, for instance with scripts/finetune.py
model = AutoModelFor{kind}Classification.from_pretrained("{model_name}", num_labels=174, trust_remote_code=True)
"""


@dataclass
class UnlabelledArguments(Arguments):
    """What a run without labels is told."""

    model: ModelArguments


class PretrainingRun(TrainingRun):
    r"""
    A run of masked pretraining: the features of the visible tokens of a clip are aligned with those that a frozen CLIP
    model gives to the same tokens of the whole clip.

    Args:
        args ([`UnlabelledArguments`]): Of the run.
        pretraining ([`PretrainingArguments`]): The teacher and the masks.

    Raises:
        `OSError`, `ValueError`: for data, models or values that don't fit.
    """

    args: UnlabelledArguments

    def __init__(self, args: UnlabelledArguments, pretraining: PretrainingArguments):
        self.pretraining = pretraining
        self.metric, self.minimize = "evaluation_loss", True
        if pretraining.probe_data is not None:
            self.metric, self.minimize = f"{pretraining.probe}_accuracy", False
        if pretraining.teacher_cache is not None and not self._clips_stay_the_same(args):
            raise ValueError("--teacher-cache is for clips that stay the same: without augmentation and --streaming")
        super().__init__(args)
        self._check_splits()
        self.teacher = load_teacher(pretraining.teacher, self.model.config, self.processor)
        self.teacher.to(self.accelerator.device)
        self.pictures: list[Picture] = []
        self.cache: TeacherCache | None = None
        if pretraining.teacher_cache is not None:
            self.cache = TeacherCache(pretraining.teacher_cache, self._teach, self._cache_identity())

    def _check_splits(self) -> None:
        args, views = self.pretraining, EvaluationViews(self.processor)
        self.check_readable("train", self.train_split, views)
        indices = spread(len(self.evaluation_split), args.evaluation_examples)
        self.check_readable(self.evaluation_name, self.evaluation_split, views, indices)
        for name, split in zip(("probe's train", "probe's test"), self.probe_splits, strict=False):
            self.check_readable(name, split, views, spread(len(split), args.probe_examples))

    @staticmethod
    def _clips_stay_the_same(args: Arguments) -> bool:
        augmentation = args.augmentation
        return not (augmentation.changes_pixels or augmentation.num_sample > 1 or args.data.streaming)

    def argument_groups(self) -> list[Any]:
        return [*super().argument_groups(), self.pretraining]

    # Data and models

    def load_data(self) -> None:
        data = self.args.data
        options: dict[str, Any] = {"data_root": data.data_root, "target": None}
        self.train_split = load_split(data.data, "train", streaming=data.streaming, **options)
        self.kind = media_kind(self.train_split)
        names = split_names(data.data)
        held_out = [name for name in EVALUATION_SPLITS if name in names]
        if not held_out and data.streaming:
            raise ValueError(f"--streaming: {data.data} must have a split validation or test to evaluate on")
        self.evaluation_name, self.evaluation_split = "train", self.train_split
        if held_out:
            self.evaluation_name = held_out[0]
            self.evaluation_split = load_split(data.data, self.evaluation_name, **options)
        if data.clip_seconds is not None:
            cut = partial(cut_into_windows, seconds=data.clip_seconds, stride_seconds=data.clip_stride_seconds)
            self.train_split, self.evaluation_split = cut(self.train_split), cut(self.evaluation_split)
        self.probe_splits = self._load_probe_splits()
        for split in (self.evaluation_split, *self.probe_splits):
            if media_kind(split) != self.kind:
                raise ValueError(f"what the run is tested on must be {self.kind}s, as the training data are")

    def _load_probe_splits(self) -> list[Split]:
        args = self.pretraining
        if args.probe_data is None:
            return []
        train = load_split(args.probe_data, "train", data_root=args.probe_data_root)
        names = getattr(train.features["label"], "names", [])
        if len(names) < 2:
            raise ValueError(f"--probe-data {args.probe_data} must have labels of at least two classes")
        held_out = find_evaluation_split(args.probe_data)
        options: dict[str, Any] = {"data_root": args.probe_data_root, "label_names": names, "indices": False}
        test = load_split(args.probe_data, held_out, **options)
        return [train, test]

    def load_model(self) -> PreTrainedModel:
        args = self.pretraining
        wanted = {name: getattr(args, name) for name in ("alignment_loss", "num_aligned_layers", "alignment_interval")}
        changes = {name: value for name, value in wanted.items() if value is not None}
        changes["alignment_size"] = teacher_config(args.teacher).projection_dim
        model = load_pretraining_model(self.args.model, self.kind, **changes)
        model.freeze_unaligned()
        return model

    def _cache_identity(self) -> dict[str, Any]:
        data, config = self.args.data, self.model.config
        return {
            "teacher": digest(self.teacher, self.teacher.model.config.to_diff_dict(), self.processor.to_dict()),
            "data": data.data,
            "clip_seconds": data.clip_seconds,
            "clip_stride_seconds": data.clip_stride_seconds,
            "num_frames": getattr(self.processor, "num_frames", None),
            "image_size": list(config.input_size),
            "patch_size": config.patch_size,
            "tubelet_size": config.tubelet_size,
            "layers": self.teacher.layers,
            "attention": self.pretraining.mask_type == "attention",
            "mixed_precision": self.accelerator.mixed_precision,
        }

    # What the loop asks for

    def training_views(self) -> TrainingViews | EvaluationViews:
        return super().training_views() if self.cache is None else EvaluationViews(self.processor)

    def objective(self, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        """Distance of the features of the visible tokens from the teacher's."""
        pixel_values = batch["pixel_values"]
        features, attention = self._teach(pixel_values) if self.cache is None else self.cache(batch)
        hidden = self._masks(self._noise(pixel_values, batch["seed"]), attention)
        aligned = model(pixel_values, hidden).aligned_features
        return {"loss": alignment_loss(aligned, take_visible(features, hidden), self.model.config.alignment_loss)}

    def _noise(self, pixel_values: torch.Tensor, seed: int) -> torch.Tensor:
        grid = token_grid(self.model.config, pixel_values)
        return draw_noise(self.accelerator, grid, len(pixel_values), self.args.augmentation.num_sample, seed)

    def _masks(self, noise: torch.Tensor, attention: torch.Tensor | None) -> torch.Tensor:
        return make_masks(noise, self.pretraining.mask_type, self.pretraining.mask_ratio, attention)

    def _teach(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        with self.accelerator.autocast():
            return self.teacher(pixel_values, output_attention=self.pretraining.mask_type == "attention")

    # Evaluation

    def evaluate(self, model: nn.Module) -> tuple[dict[str, float], dict[str, str]]:
        """
        The distance of the features of the visible tokens from the teacher's (`2 - 2 cos`, whatever the run minimises),
        that of the teacher's mean feature, and the accuracy of the probe.
        """
        was_training = model.training
        model.eval()
        metrics, broken = self._distances(model)
        if self.probe_splits:
            found = [self._encode(model, split) for split in self.probe_splits]
            # once, as the processes decide together which model is the best
            accuracy = [probe_accuracy(self.pretraining.probe, *found) if self.accelerator.is_main_process else 0.0]
            metrics[self.metric] = broadcast_object_list(accuracy)[0]
            broken |= found[0].broken | found[1].broken
        model.train(was_training)
        return metrics, broken

    def _encode(self, model: nn.Module, split: Split) -> Predictions:
        def score(pixel_values: torch.Tensor) -> torch.Tensor:
            return probe_features(model, pixel_values, math.prod(token_grid(self.model.config, pixel_values)))

        batches = self.batches_once(
            split, EvaluationViews(self.processor), spread(len(split), self.pretraining.probe_examples)
        )
        return predict(self.accelerator, model, score, batches)

    @torch.no_grad()
    def _distances(self, model: nn.Module) -> tuple[dict[str, float], dict[str, str]]:
        config, device, broken = self.model.config, self.accelerator.device, {}
        count, total = torch.zeros(2, dtype=torch.float64, device=device)
        means = torch.zeros(config.num_aligned_layers, config.alignment_size, dtype=torch.float64, device=device)
        indices = spread(len(self.evaluation_split), self.pretraining.evaluation_examples)
        batches = self.batches_once(self.evaluation_split, EvaluationViews(self.processor), indices)
        for number, batch in enumerate(batches):
            broken.update(batch["broken"])
            batch = send_to_device(batch, device)
            pixel_values, valid = batch["pixel_values"], batch["valid"]
            features, attention = self._teach(pixel_values)
            hidden = self._masks(self._noise_by_clip(pixel_values, batch["indices"]), attention)
            if number == 0:
                self.pictures = self._picture(model, batch, hidden, features)
            with self.accelerator.autocast():
                aligned = model(pixel_values, hidden).aligned_features
            visible = take_visible(features, hidden)
            total += (alignment_loss(aligned, visible) * valid).sum()
            means += visible[:, valid].mean(2).double().sum(1)
            count += valid.sum()
        sums = self.accelerator.reduce(torch.cat([total.view(1), count.view(1), means.flatten()]))
        if sums[1] == 0:
            raise NothingReadError(self.evaluation_name, broken)
        loss, means = sums[0] / sums[1], sums[2:].view_as(means) / sums[1]
        self.evaluated = int(sums[1])
        # of unit vectors, the one nearest to all of the teacher's features has the direction of their mean
        baseline = (2 - 2 * means.norm(dim=-1)).mean()
        return {"evaluation_loss": loss.item(), "mean_feature_loss": baseline.item()}, broken

    def _noise_by_clip(self, pixel_values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """The same for a clip in every evaluation, whatever the batch that it is in."""
        grid, noise = token_grid(self.model.config, pixel_values), []
        for index in indices.tolist():
            generator = torch.Generator().manual_seed(derive_seed(self.args.run.seed, index + 1))
            noise.append(torch.rand(grid, generator=generator))
        return torch.stack(noise).to(pixel_values.device)

    def _picture(self, model: nn.Module, batch: Batch, hidden: torch.Tensor, features: torch.Tensor) -> list[Picture]:
        """Frames, masks and similarities of a few clips nothing of which is hidden from the student."""
        rows = batch["valid"].nonzero().flatten()[:NUM_PICTURES]
        pixel_values, hidden, features = batch["pixel_values"][rows], hidden[rows], features[-1, rows]
        with self.accelerator.autocast():
            aligned = model(pixel_values, torch.zeros_like(hidden)).aligned_features[-1]
        grid = token_grid(self.model.config, pixel_values)
        frames = restore_pixels(pixel_values, self.processor)
        similarity = (aligned.float() * features).sum(-1)[:, 1:].unflatten(1, grid)
        shown = (frames.cpu(), hidden.unflatten(1, grid).cpu(), similarity.cpu())
        return [Picture(*clip) for clip in zip(*shown, strict=True)]

    # What it leaves

    def report(self) -> dict[str, Any]:
        draw_alignment(self.pictures, self.args.run.output_dir / "alignment.png")
        metrics = self.trainer.metrics
        print(
            f"distance from the teacher {metrics['evaluation_loss']:.4f}, that of its mean feature "
            f"{metrics['mean_feature_loss']:.4f}, on {self.evaluated} examples ({self.evaluation_name} split)"
        )
        return {}

    def card_use(self, model_name: str) -> str:
        return CARD_USE.format(model_name=model_name, kind=self.kind.capitalize())
