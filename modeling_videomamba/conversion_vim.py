"""
Vim (arXiv 2401.09417), whose image checkpoints have the names and shapes of VideoMamba's. Vim puts the class token in
the middle of the patches, so its weights would give wrong labels here without an error.
"""

from typing import Any

import torch
import torch.nn.functional as F

REASON = (
    "Vim puts the class token in the middle of the patches, VideoMamba before them, so these weights would give wrong "
    "labels."
)
MIN_LIKENESS = 0.3  # of neighbours, as training makes them; random embeddings are below it


def is_vim_name(checkpoint: Any) -> bool:
    """Whether the arguments that a trainer stored beside the weights name a model of Vim."""
    args = checkpoint.get("args") if isinstance(checkpoint, dict) else None
    name = args.get("model") if isinstance(args, dict) else getattr(args, "model", None)
    return isinstance(name, str) and name.lower().startswith("vim_")


def has_middle_class_token(position_embeddings: torch.Tensor) -> bool:
    r"""
    Whether trained position embeddings are in Vim's order. Training makes the embeddings of neighbouring patches alike
    and the class token's unlike any: in Vim's order that is the middle one, and the first is like its neighbour. What
    training has not made alike can't be told, and counts as VideoMamba's.

    Args:
        position_embeddings (`torch.Tensor` of shape `(1, 1 + P, D)`): Of a checkpoint.
    """
    positions = position_embeddings[0].float()
    count, middle = len(positions), (len(positions) - 1) // 2
    if count < 9:
        return False
    alike = F.cosine_similarity(positions[1:] - positions.mean(0), positions[:-1] - positions.mean(0), dim=-1)
    best = torch.stack([F.pad(alike, (1, 0), value=-1), F.pad(alike, (0, 1), value=-1)]).amax(0)  # of two neighbours
    patches = torch.ones(count, dtype=torch.bool)
    patches[[0, middle]] = False
    usual = best[patches].median()
    return bool(usual > MIN_LIKENESS and best[middle] < usual / 2 < best[0])
