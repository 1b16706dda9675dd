"""Visual encoders of OpenAI's CLIP, as the original release extracts them for its teachers, to Transformers."""

import math
import re

import torch
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

HEAD_SIZE = 64  # of all released CLIP models

# From OpenAI's names to those of `CLIPVisionModelWithProjection`, applied in turn.
RENAMING = (
    (r"^class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^ln_pre\.", "vision_model.pre_layrnorm."),
    (r"^ln_post\.", "vision_model.post_layernorm."),
    (r"^proj$", "visual_projection.weight"),
    (r"^transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"\.attn\.", ".self_attn."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)


def is_clip_visual_encoder(state_dict: dict[str, torch.Tensor]) -> bool:
    """Whether these are the tensors of a CLIP visual encoder under OpenAI's names."""
    return {"class_embedding", "positional_embedding", "conv1.weight", "ln_pre.weight", "proj"} <= set(state_dict)


def clip_config(state_dict: dict[str, torch.Tensor], num_attention_heads: int | None) -> CLIPVisionConfig:
    r"""
    The configuration that the shapes of the tensors imply, and `num_attention_heads`, which they don't: by default that
    of heads of 64 channels.

    Raises:
        `ValueError`: if `num_attention_heads` does not divide the width.
    """
    width, projection = state_dict["proj"].shape
    patch_size = state_dict["conv1.weight"].shape[-1]
    if num_attention_heads is None:
        num_attention_heads = max(1, width // HEAD_SIZE)
    if num_attention_heads < 1 or width % num_attention_heads:
        raise ValueError(f"`num_attention_heads` must divide the width {width}, got {num_attention_heads}.")
    layers = [int(found[1]) for name in state_dict if (found := re.match(r"transformer\.resblocks\.(\d+)\.", name))]
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=projection,
        num_hidden_layers=1 + max(layers, default=0),
        num_attention_heads=num_attention_heads,
        image_size=patch_size * math.isqrt(len(state_dict["positional_embedding"]) - 1),
        patch_size=patch_size,
        hidden_act="quick_gelu",
    )


def rename_clip(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors under the names and in the shapes of `CLIPVisionModelWithProjection`, in float32."""
    renamed: dict[str, torch.Tensor] = {}
    for original, tensor in state_dict.items():
        name, tensor = original, tensor.float()
        for pattern, replacement in RENAMING:
            name = re.sub(pattern, replacement, name)
        if original == "conv1.weight" and tensor.ndim == 5:  # inflated to one frame
            tensor = tensor.squeeze(2)
        elif original == "proj":
            tensor = tensor.T.contiguous()
        if found := re.search(r"\.in_proj_(weight|bias)$", name):
            prefix = name[: found.start()]
            for part, chunk in zip("qkv", tensor.chunk(3), strict=True):
                renamed[f"{prefix}.{part}_proj.{found[1]}"] = chunk.contiguous()
        else:
            renamed[name] = tensor
    return renamed


def build_clip(
    state_dict: dict[str, torch.Tensor], num_attention_heads: int | None
) -> tuple[CLIPVisionModelWithProjection, CLIPImageProcessor]:
    """A model without its weights, and its processor. Raises `ValueError` as [`clip_config`]."""
    config = clip_config(state_dict, num_attention_heads)
    size = config.image_size
    processor = CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    return CLIPVisionModelWithProjection(config), processor
