"""Optimiser groups and learning-rate schedule."""

import math
from typing import Any

from torch import nn


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    r"""
    Two groups for AdamW: no weight decay on biases, norms, position and class embeddings, `A_log` and `D`.

    Args:
        model (`nn.Module`): A model of this package; frozen parameters are left out.
        weight_decay (`float`): That of the other parameters.

    Returns:
        `list[dict]`: `params` and `weight_decay` of the group with decay, then of that without.
    """
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            embeds = name.endswith(("position_embeddings", "cls_token"))
            groups[parameter.ndim > 1 and not embeds and not name.endswith("A_log")].append(parameter)
    return [
        {"params": groups[True], "weight_decay": weight_decay},
        {"params": groups[False], "weight_decay": 0.0},
    ]


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
