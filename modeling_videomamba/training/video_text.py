"""Pretraining on videos and images with texts (UMT; paper, section 4.4): from arguments to a published model."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from datasets import concatenate_datasets
from torch import nn
from transformers import AutoTokenizer, BertTokenizer, DataCollatorForLanguageModeling
from transformers.modeling_utils import PreTrainedModel

from videomamba_arguments import CaptionedDataArguments, VideoTextArguments, VideoTextModelArguments

from ..modeling_videomamba_pretraining import take_visible
from ..processing_videomamba import VideoMambaProcessor
from .augmentation import training_transform
from .data import EvaluationViews, TrainingViews, cut_into_windows, derive_seed, spread
from .diagnosis import NothingReadError
from .evaluation import predict
from .loop import Batch
from .masks import draw_noise, make_masks, token_grid
from .metrics import retrieval_metrics
from .output import replace_files
from .retrieval import encode_texts, mean_directions, texts_of, tokenize
from .run import ARGUMENTS_FILE, Arguments, TrainingRun
from .sources import Split, find_evaluation_split, load_split, media_kind
from .teacher import load_teacher
from .video_text_models import image_processor_of, load_video_text_model, load_video_text_processor, make_tokenizer

DEFAULT_IMAGE_SHARE = 0.5
CARD_USE = """
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("{model_name}", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("{model_name}", trust_remote_code=True)
inputs = processor(videos="clip.mp4", text=["a dog runs", "a cat sleeps"], padding=True, return_tensors="pt")
print(model(**inputs).logits_per_video.softmax(-1))
"""


@dataclass
class CaptionedArguments(Arguments):
    """What a run on videos and texts is told."""

    data: CaptionedDataArguments
    model: VideoTextModelArguments


class VideoTextRun(TrainingRun):
    r"""
    A run of pretraining on videos and images with texts: contrastive, matching, masked language modelling and, with a
    teacher, alignment of tokens.

    Args:
        args ([`CaptionedArguments`]): Of the run.
        pretraining ([`VideoTextArguments`]): The teacher, the masks and the texts.

    Raises:
        `OSError`, `ValueError`: for data, models or values that don't fit.
    """

    args: CaptionedArguments
    model: Any
    processor: VideoMambaProcessor
    metric = "text_to_video_r1"
    find_unused_parameters = True  # of images the temporal positions, and whatever the objectives at hand don't take

    def __init__(self, args: CaptionedArguments, pretraining: VideoTextArguments):
        self.pretraining = pretraining
        super().__init__(args)
        self.tokenizer = self.processor.tokenizer
        longest = self.model.config.text_config.max_position_embeddings
        if pretraining.max_text_length > longest:
            raise ValueError(f"--max-text-length must be at most {longest}, got {pretraining.max_text_length}")
        for kind, split in self.splits.items():
            self.check_readable(f"train ({kind}s)", split, EvaluationViews(self._processor_of(kind)))
        split, wanted = self.evaluation_split, pretraining.evaluation_examples
        self.check_readable(self.evaluation_name, split, self._evaluation_views, spread(len(split), wanted))
        self.mask_words = DataCollatorForLanguageModeling(
            self.tokenizer, mlm_probability=pretraining.mlm_probability or None, mlm=pretraining.mlm_probability > 0
        )
        self.teacher: nn.Module | None = None
        if pretraining.teacher is not None:
            encoder = self.model.videomamba.config
            self.teacher = load_teacher(pretraining.teacher, encoder, self.processor.video_processor)
            self.teacher.to(self.accelerator.device)
        self.cut_texts = 0

    def argument_groups(self) -> list[Any]:
        return [*super().argument_groups(), self.pretraining]

    # Data and models

    def load_data(self) -> None:
        data = self.args.data
        self.splits = self._load_training_splits()
        self.kind = "video" if "video" in self.splits else "image"
        self.train_split = self.splits[self.kind]
        source = data.evaluation_data or data.data
        self.evaluation_name = find_evaluation_split(source)
        root = data.data_root if data.evaluation_data is None else None
        split = load_split(source, self.evaluation_name, data_root=root, target="captions")
        rows, *self.evaluation_texts = texts_of(split)
        self.evaluation_split = split.select(rows)
        if data.clip_seconds is not None and "video" not in self.splits:
            raise ValueError(f"--clip-seconds {data.clip_seconds}: the data are images")
        if data.clip_seconds is not None:
            self.splits["video"] = cut_into_windows(self.splits["video"], data.clip_seconds, data.clip_stride_seconds)

    def _load_training_splits(self) -> dict[str, Split]:
        """One for each kind, videos first."""
        data = self.args.data
        found: dict[str, list[Any]] = {"video": [], "image": []}
        for source in (data.data, *data.more_data):
            root = data.data_root if source == data.data else None
            split = load_split(source, "train", data_root=root, streaming=data.streaming, target="captions")
            found[media_kind(split)].append(split)
        for kind, splits in found.items():
            if data.streaming and len(splits) > 1:
                raise ValueError(
                    f"--streaming takes one source of {kind}s, got {len(splits)}: put shards in one folder"
                )
        if data.image_share is not None and not (data.streaming and all(found.values())):
            raise ValueError(f"--image-share {data.image_share} is for --streaming of both videos and images")
        return {kind: concatenate_datasets(splits) for kind, splits in found.items() if splits}

    def load_model(self) -> PreTrainedModel:
        return load_video_text_model(self.args.model)

    def load_processor(self) -> VideoMambaProcessor:
        tokenizer = self._made_tokenizer() if self.args.model.makes_tokenizer else None
        return load_video_text_processor(self.args.model, self.model, tokenizer)

    @property
    def _tokenizer_folder(self) -> Path:
        return self.args.run.output_dir / "tokenizer"

    def _made_tokenizer(self) -> Any:
        """From the captions; that of the run where it goes on."""
        if self.streaming:
            raise ValueError("--streaming needs --tokenizer: one is made of captions that are all there")
        vocab = [self._find_vocab() if self.accelerator.is_main_process else None]
        longest = self.model.text_model.config.max_position_embeddings
        return BertTokenizer(vocab=broadcast_object_list(vocab)[0], model_max_length=longest)

    def _find_vocab(self) -> dict[str, int]:
        if self._tokenizer_folder.exists() and (self.args.run.output_dir / ARGUMENTS_FILE).exists():
            return AutoTokenizer.from_pretrained(self._tokenizer_folder).get_vocab()
        lists = chain.from_iterable(split["captions"] for split in self.splits.values())
        captions = (text for texts in lists for text in texts if text is not None)  # reported when they are drawn
        return make_tokenizer(captions, self.model.config.text_config.vocab_size).get_vocab()

    def write_first(self, output_dir: Path) -> None:
        if self.args.model.makes_tokenizer:
            replace_files(self._tokenizer_folder, self.tokenizer.save_pretrained)
        super().write_first(output_dir)

    # Batches, each of one kind

    def views_of(self, kind: str) -> TrainingViews:
        """What the model sees of a training example."""
        augmentation, processor = self.args.augmentation, self._processor_of(kind)
        return TrainingViews(processor, training_transform(processor, augmentation), augmentation.num_sample)

    def _processor_of(self, kind: str) -> Any:
        processor = self.processor.video_processor
        return image_processor_of(processor) if kind == "image" else processor

    @cached_property
    def batches_per_epoch(self) -> dict[str, int]:
        """Of each kind, on each process."""
        counts = self._stream_batches() if self.streaming else self._split_batches()
        for kind, count in counts.items():
            if count == 0:
                raise ValueError(
                    f"there is not one batch of {kind}s in an epoch: have more of them, or smaller batches"
                )
        return counts

    def _split_batches(self) -> dict[str, int]:
        size = self.args.optimization.batch_size * self.accelerator.num_processes
        return {kind: len(split) // size for kind, split in self.splits.items()}

    def _stream_batches(self) -> dict[str, int]:
        count = (self.args.run.steps_per_epoch or 1) * self.args.optimization.gradient_accumulation_steps
        if len(self.splits) == 1:
            return {self.kind: count}
        images = round(count * (self.args.data.image_share or DEFAULT_IMAGE_SHARE))
        return {"video": count - images, "image": images}

    def examples_per_epoch(self) -> int:
        size = self.args.optimization.batch_size * self.accelerator.num_processes
        return sum(self.batches_per_epoch.values()) * size

    def batches(self, start: int, end: int) -> Iterator[Batch]:
        before = dict.fromkeys(self.splits, 0)
        order = self._kinds(end)
        for _ in range(start):
            before[next(order)] += 1
        loaders = {
            kind: iter(self.batches_of(split, self.views_of(kind), before[kind], end))
            for kind, split in self.splits.items()
        }
        for kind in order:
            yield next(loaders[kind])

    def _kinds(self, end: int) -> Iterator[str]:
        """Of each batch up to `end`: those of an epoch in an order of their own, the same on every process."""
        names, counts = list(self.batches_per_epoch), list(self.batches_per_epoch.values())
        for epoch in range(-(-end // sum(counts))):
            order = np.random.default_rng(derive_seed(self.args.run.seed, epoch)).permutation(
                np.repeat(np.arange(len(names)), counts)
            )
            yield from (names[index] for index in order[: end - epoch * len(order)])

    # What the loop asks for

    def objective(self, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        """The losses of a batch, the same for each of its rows, and whether its text was cut."""
        pixel_values = batch["pixel_values"]
        tokens, is_cut = tokenize(self.tokenizer, batch["captions"], self.pretraining.max_text_length)
        inputs = {"video_ids": batch["video_ids"], **self._hidden_words(tokens["input_ids"])}
        inputs |= self._hidden_tokens(pixel_values, batch["seed"])
        inputs = {name: value.to(pixel_values.device) for name, value in (tokens | inputs).items()}
        outputs = model(pixel_values, **inputs, return_loss=True)
        losses = {name: value.float() for name, value in outputs.items() if name.startswith("loss_")}
        losses["loss_contrastive"] = losses["loss_contrastive"] * self._share(batch["valid"])
        losses["loss"] = torch.stack(list(losses.values())).sum()
        rows = {name: value.expand(len(pixel_values)) for name, value in losses.items()}
        return {**rows, "cut_texts": is_cut.float().to(pixel_values.device)}

    def _share(self, valid: torch.Tensor) -> torch.Tensor:
        """What makes up for the loop, which weighs by the valid rows of this process: the loss counts those of all."""
        own = valid.sum().float()
        return self.accelerator.reduce(own, "mean") / own.clamp(min=1)

    def _hidden_words(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        if not self.pretraining.mlm_probability:
            return {}
        masked, labels = self.mask_words.torch_mask_tokens(input_ids.clone())
        return {"mlm_input_ids": masked, "mlm_labels": labels}

    def _hidden_tokens(self, pixel_values: torch.Tensor, seed: int) -> dict[str, torch.Tensor]:
        """Masks, and what the teacher says of the tokens that stay visible."""
        mask_type, ratio = self.pretraining.mask("video" if pixel_values.ndim == 5 else "image")
        features, attention = None, None
        if self.teacher is not None:
            with self.accelerator.autocast():
                features, attention = self.teacher(pixel_values, output_attention=mask_type == "attention")
        grid = token_grid(self.model.videomamba.config, pixel_values)
        if mask_type is None:
            hidden = torch.zeros(len(pixel_values), int(np.prod(grid)), dtype=torch.bool, device=pixel_values.device)
        else:
            noise = draw_noise(self.accelerator, grid, len(pixel_values), self.args.augmentation.num_sample, seed)
            hidden = make_masks(noise, mask_type, ratio, attention)
        found = {} if mask_type is None else {"bool_masked_pos": hidden}
        return found if features is None else {**found, "teacher_features": take_visible(features, hidden)}

    # Evaluation

    @property
    def _evaluation_views(self) -> EvaluationViews:
        return EvaluationViews(self._processor_of(media_kind(self.evaluation_split)))

    def evaluate(self, model: nn.Module) -> tuple[dict[str, float], dict[str, str]]:
        """Retrieval by the dual encoder among at most `evaluation_examples`."""
        bare, split, wanted = self.model, self.evaluation_split, self.pretraining
        if self.trainer.ema is not None:
            bare = self.trainer.ema.module
        indices = spread(len(split), wanted.evaluation_examples)
        batches = self.batches_once(split, self._evaluation_views, indices)

        def score(pixel_values: torch.Tensor) -> torch.Tensor:
            return mean_directions(bare.get_video_features(pixel_values).pooler_output)

        found = predict(self.accelerator, model, score, batches)
        if not found.scores:
            raise NothingReadError(self.evaluation_name, found.broken)
        row_of = {index: row for row, index in enumerate(sorted(found.scores))}
        pairs = [pair for pair in zip(*self.evaluation_texts, strict=True) if pair[1] in row_of]
        texts, owners = [text for text, _ in pairs], [row_of[index] for _, index in pairs]
        was_training = bare.training
        options = (self.accelerator, bare.eval(), self.tokenizer, texts, wanted.max_text_length)
        text_embeds, self.cut_texts = encode_texts(*options)
        bare.train(was_training)
        self.evaluated = len(found.scores)
        scores = torch.stack([found.scores[index] for index in row_of]) @ text_embeds.T
        return retrieval_metrics(scores, scores.T, torch.tensor(owners)), found.broken

    # What it leaves

    def save_model(self, *args: Any) -> None:
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()  # to the length of this run, nor padding to that of its last batch
        backend.no_padding()
        super().save_model(*args)

    def report(self) -> dict[str, Any]:
        print(f"evaluated on {self.evaluated} examples; {self.cut_texts} texts were longer than the model was shown")
        return {"cut_texts": self.cut_texts}

    def start(self) -> str | None:
        return self.args.model.model or self.args.model.vision

    def card_use(self, model_name: str) -> str:
        return CARD_USE.format(model_name=model_name)
