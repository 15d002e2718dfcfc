"""Large tensors on the host that hold nothing: allocated and counted, but no page of them is ever written.

A trainer that offloads keeps weights, gradients and optimizer states of a model on the host, tens or hundreds of
GiB. What comes from a phantom device has no values anyway, so copies and fills of such tensors do nothing: this
machine gives memory to a page when it is first written, and these never are. Reads of them are zeros.

Such a tensor is floating, and its storage has `LARGE_BYTES` or more: token ids, positions and masks keep their values
at any length, and so do scalars, norms and small models.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

LARGE_BYTES = 2**20
"""Of the storage, so that a view of a flat buffer is left alone as the buffer is."""


def hollow(tensor: Any) -> bool:
    """Whether `tensor`, on the host, holds nothing."""
    return bool(tensor.is_floating_point() and tensor.untyped_storage().nbytes() >= LARGE_BYTES)


@cache
def leave_large_untouched() -> Any:
    """Have operators in place skip hollow tensors, in this process from now on, and optimizers skip their updates.

    Returns what holds these operators, in force as long as it lives. The kernels below are those that PyTorch's own `clone`, `to`, `pin_memory`, `zeros` and `full` end in.
    """
    import torch
    from torch.optim import adam, sgd

    library = torch.library.Library("aten", "IMPL")
    for operator in ("copy_", "zero_", "fill_.Scalar", "fill_.Tensor", "mul_.Tensor"):
        kernel = torch.library.get_kernel(f"aten::{operator}", "CPU")
        second = operator in ("copy_", "fill_.Tensor", "mul_.Tensor")
        library.impl(operator, _in_place(kernel, second), "CPU", with_keyset=True)
    for module, name in ((adam, "adam"), (sgd, "sgd")):
        setattr(module, name, _updating(getattr(module, name)))
    return library


def _in_place(kernel: Any, second: bool) -> Callable[..., Any]:
    """An operator that writes its first argument, unless that is hollow; `second`: its second is a tensor, too."""
    import torch

    dtypes = {
        bool: torch.bool, int: torch.int64, float: torch.float64, complex: torch.complex128
    }  # fmt: skip

    def run(keys: Any, tensor: Any, *others: Any) -> Any:
        if hollow(tensor):
            return tensor
        # PyTorch makes numbers of tensors that stand for one on their way to Python.
        if second and type(others[0]) in dtypes:
            number, *rest = others
            others = (torch.scalar_tensor(number, dtype=dtypes[type(number)]), *rest)
        return kernel.call_boxed(keys, tensor, *others)

    return run


def _updating(function: Callable[..., None]) -> Callable[..., None]:
    """An optimizer's functional form, which takes a list for each of its tensors, without hollow parameters."""

    def update(params: list[Any], *others: Any, **options: Any) -> None:
        kept = [i for i, p in enumerate(params) if p.device.type != "cpu" or not hollow(p)]

        def chosen(value: Any) -> Any:
            if isinstance(value, list) and len(value) == len(params):
                return [value[i] for i in kept]
            return value

        function(
            chosen(params),
            *(chosen(each) for each in others),
            **{name: chosen(value) for name, value in options.items()},
        )

    return update
