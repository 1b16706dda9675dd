"""Registration of operators with PyTorch, and what has to see them."""

from collections.abc import Callable
from itertools import count

import torch
from torch import nn


def operator(function: Callable) -> torch.library.CustomOpDef:
    """
    Makes `function` the operator `videomamba::<its name>`, which `torch.compile` and `torch.export` keep whole.

    Code that was loaded from a Hub repository can be in a process several times, also in several versions. To register
    a name anew would pull the operator from under the copy that has it, so that a later copy takes `videomamba_1`, and
    so on.
    """
    name = function.__name__
    for copy in count():
        namespace = f"videomamba_{copy}" if copy else "videomamba"
        if not hasattr(getattr(torch.ops, namespace), name):
            return torch.library.custom_op(f"{namespace}::{name}", function, mutates_args=())
    raise AssertionError("unreachable")


def are_recorded() -> bool:
    """
    Whether something sees operators one by one, so that functions must be made of them: compilation, export and
    tracing, and modes (counters of operations, fake tensors, selective checkpoints).
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    return torch._C._len_torch_dispatch_stack() > 0


def has_hooks(module: nn.Module) -> bool:
    """Whether a hook sees the inputs or the outputs of the module."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks)


def is_tracing(tensor: torch.Tensor) -> bool:
    """Whether operators are recorded, or modules watched from inside, so that none can be passed over."""
    if are_recorded() or type(tensor) is not torch.Tensor:
        return True
    return bool(getattr(nn.modules.module, "_has_any_global_hook", bool)())
