"""Video-text checkpoints of the original release: their parts, names and configuration."""

import re

import torch
from transformers import BertConfig

from .configuration_videomamba import VideoMambaConfig, VideoMambaVideoTextConfig

StateDict = dict[str, torch.Tensor]

TEXT_LAYER = "text_encoder.bert.encoder.layer."
POSITION_IDS = "text_encoder.bert.embeddings.position_ids"
DECODER = "text_encoder.cls.predictions.decoder"

# From the original's names to those of `VideoMambaForVideoTextRetrieval`, but for the video encoder and text layers.
RENAMING = (
    (r"^pool_norm\.", "video_norm."),
    (r"^vision_proj\.", "video_projection."),
    (r"^text_proj\.", "text_projection."),
    (r"^itm_head\.", "matching_head."),
    (r"^temp$", "temperature"),
    (r"^text_encoder\.bert\.embeddings\.", "text_model.embeddings."),
    (r"^text_encoder\.cls\.", "masked_lm_head."),
)

# Without which a file is no video-text checkpoint.
REQUIRED = (
    "temp",
    "vision_proj.weight",
    "text_encoder.bert.embeddings.word_embeddings.weight",
    "text_encoder.bert.embeddings.position_embeddings.weight",
    "text_encoder.bert.embeddings.token_type_embeddings.weight",
    f"{TEXT_LAYER}0.intermediate.dense.weight",
    f"{DECODER}.weight",
    f"{DECODER}.bias",
    "text_encoder.cls.predictions.bias",
)


def is_video_text(state_dict: StateDict) -> bool:
    """Whether these are tensors of a model of videos and texts."""
    return bool({name.split(".")[0] for name in state_dict} & {"vision_encoder", "text_encoder"})


def part(state_dict: StateDict, prefix: str) -> StateDict:
    """The tensors whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state_dict.items() if name.startswith(prefix)}


def fusion_layer(state_dict: StateDict) -> int:
    """The first layer of BERT that attends to the video. Raises `ValueError` if none does, or not all above it."""
    layers = {int(found[1]) for name in state_dict if (found := re.match(rf"{re.escape(TEXT_LAYER)}(\d+)\.", name))}
    fused = {layer for layer in layers if f"{TEXT_LAYER}{layer}.crossattention.self.key.weight" in state_dict}
    if not fused or fused != set(range(min(fused), max(layers) + 1)):
        raise ValueError(f"The last layers of BERT must attend to the video, of {sorted(layers)} {sorted(fused)} do.")
    return min(fused)


def video_text_config(
    state_dict: StateDict, vision_config: VideoMambaConfig, num_attention_heads: int
) -> VideoMambaVideoTextConfig:
    r"""
    The configuration that the shapes of the tensors imply, and `num_attention_heads`, which they don't.

    Raises:
        `ValueError`: if `num_attention_heads` does not divide the width of BERT, or a value doesn't fit.
    """
    embeddings = part(state_dict, "text_encoder.bert.embeddings.")
    vocab_size, hidden_size = embeddings["word_embeddings.weight"].shape
    if num_attention_heads < 1 or hidden_size % num_attention_heads:
        raise ValueError(f"`text_num_attention_heads` must divide the width {hidden_size}, got {num_attention_heads}.")
    layers = [int(name.split(".")[0]) for name in part(state_dict, TEXT_LAYER)]
    text_config = BertConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=1 + max(layers),
        num_attention_heads=num_attention_heads,
        intermediate_size=len(state_dict[f"{TEXT_LAYER}0.intermediate.dense.weight"]),
        max_position_embeddings=len(embeddings["position_embeddings.weight"]),
        type_vocab_size=len(embeddings["token_type_embeddings.weight"]),
    )
    tied = torch.equal(state_dict[f"{DECODER}.weight"], embeddings["word_embeddings.weight"])
    tied = tied and torch.equal(state_dict[f"{DECODER}.bias"], state_dict["text_encoder.cls.predictions.bias"])
    return VideoMambaVideoTextConfig(
        vision_config=vision_config,
        text_config=text_config,
        fusion_layer=fusion_layer(state_dict),
        projection_dim=len(state_dict["vision_proj.weight"]),
        temperature=state_dict["temp"].item(),
        tie_word_embeddings=tied,
    )


def rename_video_text(name: str, first_fusion_layer: int) -> str:
    """Name in `VideoMambaForVideoTextRetrieval` of a tensor of the original outside of its video encoder."""
    if name.startswith(TEXT_LAYER):
        index, _, rest = name.removeprefix(TEXT_LAYER).partition(".")
        fused = int(index) - first_fusion_layer
        return f"text_model.encoder.layer.{index}.{rest}" if fused < 0 else f"fusion_layers.{fused}.{rest}"
    for pattern, replacement in RENAMING:
        name = re.sub(pattern, replacement, name)
    return name
