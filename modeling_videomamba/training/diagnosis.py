"""What is said of a run whose losses or gradients are not finite."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class RunError(RuntimeError):
    """What ends a run on its way; the message says why."""


class NothingReadError(RunError, ValueError):
    """No example of a split can be read."""

    def __init__(self, split_name: str, broken: dict[str, str]):
        first = f", the first: {next(iter(broken.values()))}" if broken else ""
        super().__init__(f"no example of the {split_name} split can be read: {len(broken)} broken files{first}")


class NonFiniteError(RunError):
    """Several steps in a row had a loss or a gradient that is not finite; the message names the places."""


def describe(tensor: torch.Tensor) -> dict[str, float]:
    """Share of the entries that are not finite, and the mean and largest magnitude of the others."""
    values = tensor.detach().float().flatten()
    finite = values[values.isfinite()].abs()
    return {
        "non_finite": 1 - len(finite) / max(len(values), 1),
        "mean": finite.mean().item() if len(finite) else 0.0,
        "largest": finite.max().item() if len(finite) else 0.0,
    }


def diagnose(model: nn.Module, compute_loss: Callable[[], Any]) -> dict[str, dict[str, dict[str, float]]]:
    r"""
    Statistics of a step that went wrong, by names of modules and parameters, in the order of the forward pass.

    Args:
        model (`nn.Module`): Whose parameters still have the gradients.
        compute_loss (`Callable`): Runs its forward pass again.

    Returns:
        `dict`: `outputs` of embeddings, layers and head, `weights` and `gradients`, each from names to what
        [`describe`] returns.
    """
    outputs: dict[str, dict[str, float]] = {}

    def record(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if isinstance(first, torch.Tensor):
                outputs[name] = describe(first)

        return hook

    handles = [module.register_forward_hook(record(name)) for name, module in model.named_modules() if name]
    try:
        with torch.no_grad():
            compute_loss()
    finally:
        for handle in handles:
            handle.remove()
    parameters = list(model.named_parameters())
    return {
        "outputs": outputs,
        "weights": {name: describe(parameter) for name, parameter in parameters},
        "gradients": {name: describe(parameter.grad) for name, parameter in parameters if parameter.grad is not None},
    }


def summarize(diagnosis: dict[str, dict[str, dict[str, float]]]) -> str:
    """One line for weights, outputs and gradients: the first of them that is not finite, or the largest one."""
    lines = []
    for kind in ("weights", "outputs", "gradients"):
        statistics = diagnosis[kind]
        if not statistics:
            continue
        broken = [name for name, values in statistics.items() if values["non_finite"]]
        if broken:
            # gradients come from the last module to the first
            first = broken[-1] if kind == "gradients" else broken[0]
            share = statistics[first]["non_finite"]
            lines.append(f"{kind}: not finite in {len(broken)} of {len(statistics)}, first {first} ({share:.1%})")
        else:
            largest = max(statistics, key=lambda name: statistics[name]["largest"])
            lines.append(f"{kind}: finite, the largest is {statistics[largest]['largest']:.3g} in {largest}")
    return "\n".join(lines)
