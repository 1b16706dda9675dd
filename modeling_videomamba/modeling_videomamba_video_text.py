"""PyTorch VideoMamba with a BERT whose upper layers attend to the video, for video-text retrieval (UMT)."""

import os
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, BertConfig, BertForMaskedLM, BertModel
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import PreTrainedModel
from transformers.models.bert.modeling_bert import (
    BertAttention,
    BertLayer,
    BertLMPredictionHead,
    BertOnlyMLMHead,
)
from transformers.pytorch_utils import apply_chunking_to_forward
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from .configuration_videomamba import MAX_TEMPERATURE, MIN_TEMPERATURE, VideoMambaConfig, VideoMambaVideoTextConfig
from .embeddings import visible_tokens
from .modeling_videomamba import VideoMambaModel
from .modeling_videomamba_pretraining import (
    VideoMambaAlignmentDecoder,
    VideoMambaForMaskedPreTraining,
    align,
    aligned_streams,
    alignment_loss,
    init_alignment_decoder,
    sinusoidal_positions,
)
from .video_text_losses import (
    contrastive_loss,
    draw_negatives,
    hard_negative_weights,
    masked_lm_loss,
    mean_where,
    similarities,
)
from .zero_shot_video_classification import CUSTOM_PIPELINES


@dataclass
class VideoMambaVideoTextOutput(ModelOutput):
    r"""
    Output of [`VideoMambaForVideoTextRetrieval`].

    Args:
        loss (`torch.Tensor` of shape `()`, *optional*, returned with `return_loss`):
            Sum of the losses below that there are.
        loss_contrastive (`torch.Tensor` of shape `()`, *optional*, returned with `return_loss`):
            Of [`contrastive_loss`].
        loss_matching (`torch.Tensor` of shape `()`, *optional*, returned with `return_loss`):
            Cross-entropy of telling pairs from hard negatives.
        loss_masked_lm (`torch.Tensor` of shape `()`, *optional*, returned with `mlm_input_ids`):
            Cross-entropy of the masked tokens, given the video.
        loss_alignment (`torch.Tensor` of shape `()`, *optional*, returned with `teacher_features`):
            Mean of [`alignment_loss`].
        logits_per_video (`torch.Tensor` of shape `(videos, texts)`):
            Mean over the frames of the cosine of a frame and a text, divided by the temperature.
        logits_per_text (`torch.Tensor` of shape `(texts, videos)`):
            The same the other way round.
        video_embeds (`torch.Tensor` of shape `(videos, frames, projection_dim)`):
            Of each frame, l2-normalised; one for all frames with `pooling="cls"`.
        text_embeds (`torch.Tensor` of shape `(texts, projection_dim)`):
            l2-normalised.
    """

    loss: torch.Tensor | None = None
    loss_contrastive: torch.Tensor | None = None
    loss_matching: torch.Tensor | None = None
    loss_masked_lm: torch.Tensor | None = None
    loss_alignment: torch.Tensor | None = None
    logits_per_video: torch.Tensor | None = None
    logits_per_text: torch.Tensor | None = None
    video_embeds: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None


class VideoMambaFusionLayer(BertLayer):
    """A layer of BERT that attends to the tokens of a video between its self-attention and its feed-forward part."""

    def __init__(self, config: BertConfig, vision_hidden_size: int):
        super().__init__(config)
        self.crossattention = BertAttention(config, is_cross_attention=True)
        attention = self.crossattention.self
        attention.key = nn.Linear(vision_hidden_size, attention.all_head_size)
        attention.value = nn.Linear(vision_hidden_size, attention.all_head_size)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, video_hidden_states: torch.Tensor
    ) -> torch.Tensor:
        """Texts `(batch, length, D)` and videos `(batch or 1, tokens, vision_hidden_size)` to texts."""
        hidden_states, _ = self.attention(hidden_states, attention_mask)
        shape = hidden_states.shape
        if len(video_hidden_states) == 1:  # whose keys and values are computed once for all texts
            hidden_states = hidden_states.flatten(0, 1).unsqueeze(0)
        hidden_states, _ = self.crossattention(hidden_states, encoder_hidden_states=video_hidden_states)
        hidden_states = hidden_states.view(shape)
        return apply_chunking_to_forward(
            self.feed_forward_chunk, self.chunk_size_feed_forward, self.seq_len_dim, hidden_states
        )


class VideoMambaVideoTextPreTrainedModel(PreTrainedModel):
    """Initialisation and loading of models of videos and texts; the towers initialise themselves."""

    config: VideoMambaVideoTextConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("video", "image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = [
        "VideoMambaEmbeddings",
        "VideoMambaLayer",
        "BertEmbeddings",
        "BertLayer",
        "VideoMambaFusionLayer",
    ]


class VideoMambaForVideoTextRetrieval(VideoMambaVideoTextPreTrainedModel):
    r"""
    VideoMamba and BERT in one space, by which videos and texts are found (dual encoder), and the upper layers of BERT,
    which attend to the video, by which pairs are judged more exactly (fusion).
    """

    _tied_weights_keys = {
        "masked_lm_head.predictions.decoder.weight": "text_model.embeddings.word_embeddings.weight",
        "masked_lm_head.predictions.decoder.bias": "masked_lm_head.predictions.bias",
    }

    def __init__(self, config: VideoMambaVideoTextConfig):
        super().__init__(config)
        vision, text = cast(VideoMambaConfig, config.vision_config), cast(BertConfig, config.text_config)
        self.videomamba = VideoMambaModel(vision)
        self.video_norm = nn.LayerNorm(vision.hidden_size)
        self.video_projection = nn.Linear(vision.hidden_size, config.projection_dim)
        self.text_model = BertModel(text, add_pooling_layer=False)
        del self.text_model.encoder.layer[config.fusion_layer :]
        self.fusion_layers = nn.ModuleList(
            VideoMambaFusionLayer(text, vision.hidden_size) for _ in range(config.fusion_layer, text.num_hidden_layers)
        )
        self.text_projection = nn.Linear(text.hidden_size, config.projection_dim)
        self.matching_head = nn.Linear(text.hidden_size, 2)
        self.masked_lm_head = BertOnlyMLMHead(text)
        self.alignment_decoders = nn.ModuleList(VideoMambaAlignmentDecoder(vision) for _ in vision.aligned_layers)
        self.temperature = nn.Parameter(torch.tensor(float(config.temperature)))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, VideoMambaAlignmentDecoder):
            init_alignment_decoder(module)
            return
        super()._init_weights(module)
        if module is self:
            init.constant_(self.temperature, self.config.temperature)
        elif isinstance(module, BertLMPredictionHead):
            init.zeros_(module.bias)

    def get_input_embeddings(self) -> nn.Module:
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.text_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.masked_lm_head.predictions.decoder

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.masked_lm_head.predictions.decoder = new_embeddings
        self.masked_lm_head.predictions.bias = new_embeddings.bias

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        if self._auto_class is not None:  # the pipeline's code goes where the model's does
            self.config.custom_pipelines = CUSTOM_PIPELINES
        super().save_pretrained(save_directory, **kwargs)

    # One modality

    def get_video_features(
        self, pixel_values: torch.Tensor, bool_masked_pos: torch.Tensor | None = None
    ) -> BaseModelOutputWithPooling:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(batch, frames, channels, height, width)`, or
                `(batch, channels, height, width)` for images): As in [`VideoMambaModel.forward`].
            bool_masked_pos (`torch.Tensor` of shape `(batch, T'P)`, boolean, *optional*): As there.

        Returns:
            `BaseModelOutputWithPooling`: `last_hidden_state` `(batch, visible, D)`, the patch tokens, which the fusion
            layers attend to, and `pooler_output` `(batch, frames, projection_dim)`, of each frame, not normalised.

        Raises:
            `ValueError`: if the shape of an argument does not fit.
        """
        return self._encode_videos(pixel_values, bool_masked_pos)[0]

    def get_text_features(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> BaseModelOutputWithPooling:
        r"""
        Args:
            input_ids (`torch.Tensor` of shape `(batch, length)`, int64): Of the tokenizer.
            attention_mask (`torch.Tensor` of shape `(batch, length)`, *optional*): 1 for tokens, 0 for padding.

        Returns:
            `BaseModelOutputWithPooling`: `last_hidden_state` `(batch, length, D)` below the fusion layers, which go on
            with it, and `pooler_output` `(batch, projection_dim)`, not normalised.

        Raises:
            `ValueError`: if a text is longer than the model knows positions.
        """
        longest = self.text_model.config.max_position_embeddings
        if input_ids.shape[-1] > longest:
            raise ValueError(f"`input_ids` must have at most {longest} tokens a text, got {input_ids.shape[-1]}.")
        hidden_states = self.text_model(input_ids, attention_mask, return_dict=True).last_hidden_state
        return BaseModelOutputWithPooling(
            last_hidden_state=hidden_states, pooler_output=self.text_projection(hidden_states[:, 0])
        )

    def _encode_videos(
        self, pixel_values: torch.Tensor, bool_masked_pos: torch.Tensor | None, with_alignment: bool = False
    ) -> tuple[BaseModelOutputWithPooling, torch.Tensor | None]:
        """What [`get_video_features`] returns, and what is aligned with a teacher."""
        vision, depth = self.videomamba.config, self.videomamba.config.num_hidden_layers
        wanted = {depth, *aligned_streams(vision)} if with_alignment else {depth}
        streams = self.videomamba.residual_streams(pixel_values, bool_masked_pos, wanted)
        num_steps = 1 if pixel_values.ndim == 4 else pixel_values.shape[1] // vision.tubelet_size
        height, width = pixel_values.shape[-2:]
        per_step = (height // vision.patch_size) * (width // vision.patch_size)
        tokens = torch.arange(1 + num_steps * per_step, device=pixel_values.device).unsqueeze(0)
        if bool_masked_pos is not None:
            tokens = visible_tokens(bool_masked_pos, len(pixel_values), num_steps * per_step)
        hidden_states = self.videomamba.norm(streams[depth])
        pooled = self._pool(hidden_states, (tokens[:, 1:] - 1) // per_step, num_steps)
        output = BaseModelOutputWithPooling(
            last_hidden_state=hidden_states[:, 1:], pooler_output=self.video_projection(self.video_norm(pooled))
        )
        if not with_alignment:
            return output, None
        positions = sinusoidal_positions(1 + num_steps * per_step, vision.hidden_size, tokens.device)[tokens]
        return output, align(vision, self.alignment_decoders, self.videomamba.norm, streams, positions)

    def _pool(self, hidden_states: torch.Tensor, steps: torch.Tensor, num_steps: int) -> torch.Tensor:
        """A vector of each frame `(batch, num_steps, D)`; `steps` `(batch or 1, visible)` are those of the tokens."""
        class_token, patches = hidden_states[:, :1], hidden_states[:, 1:]
        if self.config.pooling == "cls":
            return class_token
        belongs = F.one_hot(steps, num_steps).to(patches.dtype).mT
        means = (belongs / belongs.sum(dim=-1, keepdim=True).clamp(min=1)) @ patches
        return means if self.config.pooling == "avg" else means + class_token

    # Both

    def similarity_logits(self, video_embeds: torch.Tensor, text_embeds: torch.Tensor) -> torch.Tensor:
        r"""
        Args:
            video_embeds (`torch.Tensor` of shape `(videos, frames, projection_dim)`): l2-normalised.
            text_embeds (`torch.Tensor` of shape `(texts, projection_dim)`): l2-normalised.

        Returns:
            `torch.Tensor` of shape `(videos, texts)`: [`similarities`] divided by the temperature.
        """
        return similarities(video_embeds, text_embeds) / self.bounded_temperature

    @property
    def bounded_temperature(self) -> torch.Tensor:
        """The temperature within its bounds; beyond them the gradient of the parameter is that at the bound."""
        bounded = self.temperature.clamp(MIN_TEMPERATURE, MAX_TEMPERATURE)
        return self.temperature + (bounded - self.temperature).detach()

    def fuse(
        self,
        video_hidden_states: torch.Tensor,
        text_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        r"""
        Texts that attend to videos, pair by pair.

        Args:
            video_hidden_states (`torch.Tensor` of shape `(pairs, tokens, vision_hidden_size)`):
                `last_hidden_state` of [`get_video_features`]. One video, with all texts, takes much less time.
            text_hidden_states (`torch.Tensor` of shape `(pairs, length, D)`):
                `last_hidden_state` of [`get_text_features`].
            attention_mask (`torch.Tensor` of shape `(pairs, length)`, *optional*): 1 for tokens, 0 for padding.

        Returns:
            `torch.Tensor` of shape `(pairs, length, D)`.
        """
        mask = create_bidirectional_mask(self.text_model.config, text_hidden_states, attention_mask)
        for layer in self.fusion_layers:
            text_hidden_states = layer(text_hidden_states, mask, video_hidden_states)
        return text_hidden_states

    def matching_logits_of_encoded(
        self,
        video_hidden_states: torch.Tensor,
        text_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[`matching_logits`] of what is encoded already; arguments as in [`fuse`]."""
        return self.matching_head(self.fuse(video_hidden_states, text_hidden_states, attention_mask)[:, 0])

    def matching_logits(
        self, pixel_values: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        r"""
        Whether videos and texts belong together, pair by pair, as the fusion layers see it.

        Args:
            pixel_values, input_ids, attention_mask: As in [`get_video_features`] and [`get_text_features`].

        Returns:
            `torch.Tensor` of shape `(pairs, 2)`: scores of no and yes before the softmax.
        """
        videos = self.get_video_features(pixel_values).last_hidden_state
        texts = self.get_text_features(input_ids, attention_mask).last_hidden_state
        return self.matching_logits_of_encoded(videos, texts, attention_mask)

    def masked_lm_logits(
        self,
        video_hidden_states: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Scores `(pairs, length, vocab_size)` of the words of masked texts, given the videos, as in [`fuse`]."""
        texts = self.get_text_features(input_ids, attention_mask).last_hidden_state
        return self.masked_lm_head(self.fuse(video_hidden_states, texts, attention_mask))

    def matching_loss(
        self,
        video_hidden_states: torch.Tensor,
        text_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        negative_videos: torch.Tensor,
        negative_texts: torch.Tensor,
        counts: torch.Tensor | None = None,
    ) -> torch.Tensor:
        r"""
        Cross-entropy of telling each pair from its text with another video and from its video with another text.

        Args:
            video_hidden_states, text_hidden_states, attention_mask: As in [`fuse`].
            negative_videos, negative_texts (`torch.Tensor` of shape `(pairs,)`, int64):
                Index of the other; -1 where there is none.
            counts (`torch.Tensor` of shape `(pairs,)`, boolean, *optional*): Which pairs count; by default all.

        Returns:
            `torch.Tensor` of shape `()`: the mean over what there is.
        """
        if counts is None:
            counts = torch.ones_like(negative_videos, dtype=torch.bool)
        own = torch.arange(len(counts), device=counts.device)
        videos = torch.cat([own, negative_videos.clamp(min=0), own])
        texts = torch.cat([own, own, negative_texts.clamp(min=0)])
        mask = None if attention_mask is None else attention_mask[texts]
        # `index_select` adds its gradients in order, which indexing doesn't with several threads
        chosen = video_hidden_states.index_select(0, videos), text_hidden_states.index_select(0, texts)
        logits = self.matching_logits_of_encoded(*chosen, mask)
        labels = torch.cat([torch.ones_like(own), torch.zeros_like(own), torch.zeros_like(own)])
        counts = torch.cat([counts, counts & (negative_videos >= 0), counts & (negative_texts >= 0)])
        return mean_where(F.cross_entropy(logits.float(), labels, reduction="none"), counts)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        video_ids: torch.Tensor | None = None,
        mlm_input_ids: torch.Tensor | None = None,
        mlm_labels: torch.Tensor | None = None,
        teacher_features: torch.Tensor | None = None,
        bool_masked_pos: torch.Tensor | None = None,
        return_loss: bool = False,
    ) -> VideoMambaVideoTextOutput:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(videos, frames, channels, height, width)`, or
                `(videos, channels, height, width)` for images): As in [`VideoMambaModel.forward`].
            input_ids (`torch.Tensor` of shape `(texts, length)`, int64): With `return_loss` as many as videos.
            attention_mask (`torch.Tensor` of shape `(texts, length)`, *optional*): 1 for tokens, 0 for padding.
            video_ids (`torch.Tensor` of shape `(videos,)`, int64, *optional*):
                The same for pairs of the same video, whose texts are right for each other; negative for a pair that
                doesn't count. By default every pair is of a video of its own.
            mlm_input_ids (`torch.Tensor` of shape `(texts, length)`, *optional*): The texts with tokens masked.
            mlm_labels (`torch.Tensor` of shape `(texts, length)`, *optional*): Tokens that were masked, elsewhere -100.
            teacher_features (`torch.Tensor` of shape `(num_aligned_layers, videos, 1 + visible, alignment_size)`,
                *optional*): As in [`VideoMambaForMaskedPreTraining.forward`].
            bool_masked_pos (`torch.Tensor` of shape `(videos, T'P)`, boolean, *optional*): As there.
            return_loss (`bool`, defaults to `False`): Whether to compute the losses, on pairs.

        Returns:
            [`VideoMambaVideoTextOutput`]

        Raises:
            `ValueError`: if the shape of an argument does not fit, or an argument is missing.
        """
        self._check(pixel_values, input_ids, video_ids, mlm_input_ids, mlm_labels, teacher_features, return_loss)
        videos, aligned_features = self._encode_videos(pixel_values, bool_masked_pos, teacher_features is not None)
        texts = self.get_text_features(input_ids, attention_mask)
        video_embeds = F.normalize(videos.pooler_output.float(), dim=-1)
        text_embeds = F.normalize(texts.pooler_output.float(), dim=-1)
        logits_per_video = self.similarity_logits(video_embeds, text_embeds)
        losses: dict[str, torch.Tensor] = {}
        if return_loss:
            counts = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
            if video_ids is not None:
                counts = video_ids >= 0
            tokens = videos.last_hidden_state
            losses["loss_contrastive"] = contrastive_loss(
                video_embeds, text_embeds, self.bounded_temperature, video_ids
            )
            negatives = self._draw_negatives(logits_per_video.detach(), input_ids, video_ids)
            losses["loss_matching"] = self.matching_loss(
                tokens, texts.last_hidden_state, attention_mask, *negatives, counts
            )
            if mlm_input_ids is not None and mlm_labels is not None:
                logits = self.masked_lm_logits(tokens, mlm_input_ids, attention_mask)
                losses["loss_masked_lm"] = masked_lm_loss(logits, mlm_labels.masked_fill(~counts[:, None], -100))
            if teacher_features is not None and aligned_features is not None:
                kind = self.videomamba.config.alignment_loss
                distances = alignment_loss(aligned_features, teacher_features, kind)
                losses["loss_alignment"] = mean_where(distances, counts)
        return VideoMambaVideoTextOutput(
            loss=torch.stack(list(losses.values())).sum() if losses else None,
            **losses,
            logits_per_video=logits_per_video,
            logits_per_text=logits_per_video.T,
            video_embeds=video_embeds,
            text_embeds=text_embeds,
        )

    @staticmethod
    def _draw_negatives(
        logits_per_video: torch.Tensor, input_ids: torch.Tensor, video_ids: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        The video and the text that each pair is to be told from, as [`matching_loss`] takes them. A pair with the same
        text is right too, and would be the hardest negative.
        """
        same = (input_ids[:, None] == input_ids).all(dim=-1)
        if video_ids is not None:
            same = same | (video_ids[:, None] == video_ids) | (video_ids < 0)
        videos = draw_negatives(hard_negative_weights(logits_per_video.T, same))
        return videos, draw_negatives(hard_negative_weights(logits_per_video, same))

    @staticmethod
    def _check(pixel_values, input_ids, video_ids, mlm_input_ids, mlm_labels, teacher_features, return_loss) -> None:
        """Raises `ValueError` for arguments that don't go together."""
        for_losses = {
            "video_ids": video_ids,
            "mlm_input_ids": mlm_input_ids,
            "mlm_labels": mlm_labels,
            "teacher_features": teacher_features,
        }
        given = [name for name, value in for_losses.items() if value is not None]
        if given and not return_loss:
            raise ValueError(f"`{given[0]}` is for the losses: pass `return_loss=True`.")
        if (mlm_input_ids is None) != (mlm_labels is None):
            raise ValueError(f"`mlm_input_ids` and `mlm_labels` go together, got only `{given[-1]}`.")
        for name in ("mlm_input_ids", "mlm_labels"):
            if for_losses[name] is not None and for_losses[name].shape != input_ids.shape:
                shapes = f"{tuple(input_ids.shape)}, got {tuple(for_losses[name].shape)}"
                raise ValueError(f"`{name}` must have the shape of `input_ids`, {shapes}.")
        pairs = len(pixel_values)
        if return_loss and len(input_ids) != pairs:
            raise ValueError(
                f"For losses `input_ids` must be as many as `pixel_values`, {pairs}, got {len(input_ids)}."
            )
        if video_ids is not None and (video_ids.shape != (pairs,) or video_ids.dtype != torch.int64):
            raise ValueError(
                f"`video_ids` must be int64 of shape {(pairs,)}, got {video_ids.dtype} {tuple(video_ids.shape)}."
            )

    @classmethod
    def from_video_text_pretrained(
        cls, vision: str | os.PathLike, text: str | os.PathLike, **changes: Any
    ) -> "VideoMambaForVideoTextRetrieval":
        r"""
        A model to pretrain, from any VideoMamba and any BERT. The upper layers of BERT become fusion layers, whose
        attention to the video is new, as are the projections and the head for matching.

        Args:
            vision (`str` or `os.PathLike`): Directory or Hub id; of masked pretraining, its decoders are kept.
            text (`str` or `os.PathLike`): Directory or Hub id of a BERT.
            changes: Fields of [`VideoMambaVideoTextConfig`]; with the prefix `vision_` or `text_` arguments of the
                `from_pretrained` of a tower, such as fields of its configuration, or `text_revision`.

        Raises:
            `OSError`: if there is no such model.
            `ValueError`: if `vision` is no VideoMamba or `text` no BERT, or one lacks weights of its encoder.

        Example:

        ```python
        >>> model = VideoMambaForVideoTextRetrieval.from_video_text_pretrained(
        ...     "org/videomamba-m-umt", "google-bert/bert-base-uncased"
        ... )
        ```
        """
        of_vision, of_text = (
            {name.removeprefix(prefix): changes.pop(name) for name in list(changes) if name.startswith(prefix)}
            for prefix in ("vision_", "text_")
        )
        text_config = AutoConfig.from_pretrained(text, **of_text)
        video_encoder = cls._tower(VideoMambaForMaskedPreTraining, vision, of_vision)
        changes.setdefault("tie_word_embeddings", getattr(text_config, "tie_word_embeddings", True))
        config = cls.config_class(vision_config=video_encoder.config, text_config=text_config, **changes)
        model = cls(config)
        model.videomamba.load_state_dict(video_encoder.videomamba.state_dict())
        model.alignment_decoders.load_state_dict(video_encoder.alignment_decoders.state_dict())
        bert = cls._tower(BertForMaskedLM, text, of_text)
        model.text_model.embeddings.load_state_dict(bert.bert.embeddings.state_dict())
        for index, layer in enumerate(bert.bert.encoder.layer):
            fused = index - config.fusion_layer
            target = model.text_model.encoder.layer[index] if fused < 0 else model.fusion_layers[fused]
            target.load_state_dict(layer.state_dict(), strict=False)
        model.masked_lm_head.load_state_dict(bert.cls.state_dict())
        return model

    @staticmethod
    def _tower(model_class: Any, name: str | os.PathLike, options: dict[str, Any]) -> Any:
        """An encoder to start from, whose heads may be new."""
        model, info = model_class.from_pretrained(name, output_loading_info=True, **options)
        prefix = f"{model_class.base_model_prefix}."
        if lacking := sorted(key for key in info["missing_keys"] if key.startswith(prefix)):
            raise ValueError(f"{name} has no weights for {lacking[0]} (missing in all: {len(lacking)}).")
        return model


__all__ = ["VideoMambaForVideoTextRetrieval", "VideoMambaVideoTextOutput"]
