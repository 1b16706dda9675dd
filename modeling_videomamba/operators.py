"""Registration of operators with PyTorch, and what has to see them."""

from collections.abc import Callable
from itertools import count

import torch


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
