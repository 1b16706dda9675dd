"""Optimiser groups and learning-rate schedule."""

import math
import re
from typing import Any

from torch import nn


def parameter_groups(model: nn.Module, weight_decay: float, layer_decay: float = 1.0) -> list[dict[str, Any]]:
    r"""
    Groups for AdamW: no weight decay on biases, norms, position and class embeddings, `A_log` and `D`; the learning
    rate of each layer a fraction of that of the next one.

    Args:
        model (`nn.Module`): A model of this package; frozen parameters are left out.
        weight_decay (`float`): That of the other parameters.
        layer_decay (`float`, defaults to 1.0):
            The head and the final norm learn at the full rate, layer `i` of `depth` at `layer_decay ** (depth - i)` of
            it, the embeddings at `layer_decay ** (depth + 1)`.

    Returns:
        `list[dict]`: groups with `params`, `weight_decay`, and `lr_scale`, by which the learning rate is multiplied;
        from the embeddings on.
    """
    top = 1 + max((_layer(name, 0) for name, _ in model.named_parameters()), default=0)
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((_layer(name, top), _decays(name, parameter)), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": weight_decay if decays else 0.0,
            "lr_scale": layer_decay ** (top - layer),
        }
        for (layer, decays), parameters in sorted(groups.items(), key=lambda group: group[0])
    ]


def _layer(name: str, top: int) -> int:
    """0 for the embeddings, `i + 1` for layer `i`, `top` for what comes after the layers."""
    if found := re.search(r"\blayers\.(\d+)\.", name):
        return int(found[1]) + 1
    return 0 if "embeddings." in name else top


def _decays(name: str, parameter: nn.Parameter) -> bool:
    embeds = name.endswith(("position_embeddings", "cls_token"))
    return parameter.ndim > 1 and not embeds and not name.endswith("A_log")


def cosine_schedule(
    step: int,
    *,
    base: float,
    final: float,
    epochs: float,
    steps_per_epoch: int,
    warmup_epochs: float = 0,
    start_warmup: float = 0.0,
) -> float:
    r"""
    Learning rate of a step: linear warm-up from `start_warmup` to `base`, both included, then half a cosine from `base`
    towards `final`. This is the schedule of the released runs.

    Args:
        step (`int`): From 0.
        base, final, start_warmup (`float`): Learning rates.
        epochs, warmup_epochs (`float`): All epochs, and those of them that warm up.
        steps_per_epoch (`int`): Optimiser steps of an epoch.

    Returns:
        `float`: the learning rate; `final` from the end on.

    Raises:
        `ValueError`: if the warm-up is longer than the run.
    """
    total, warmup = round(epochs * steps_per_epoch), round(warmup_epochs * steps_per_epoch)
    if warmup > total:
        raise ValueError(f"`warmup_epochs` ({warmup_epochs}) must not be above `epochs` ({epochs}).")
    if step < warmup:
        return start_warmup + (base - start_warmup) * step / max(warmup - 1, 1)
    if step >= total:
        return final
    return final + 0.5 * (base - final) * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))
