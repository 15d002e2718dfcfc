"""Hollow tensors: large tensors on the host that are allocated and counted, but never written.

A trainer that offloads keeps weights, gradients and optimizer states of a model on the host, tens
or hundreds of GiB. Data from a phantom device has no values, so copies and fills of hollow tensors
do nothing. The operating system provides memory for a page when it is first written, so hollow
tensors take none. Reads return zeros.

A tensor is hollow if it is floating point and its storage has at least `LARGE_BYTES`. Token ids,
positions and masks keep their values at any length, and so do scalars, norms and small models.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

LARGE_BYTES = 2**20
"""Smallest storage of a hollow tensor. The storage counts, so that a view is treated like the flat
buffer that it belongs to."""


def hollow(tensor: Any) -> bool:
    """Whether the host tensor `tensor` is hollow."""
    return bool(tensor.is_floating_point() and tensor.untyped_storage().nbytes() >= LARGE_BYTES)


@cache
def leave_large_untouched() -> Any:
    """Make in-place operators and optimizer updates skip hollow tensors in this process from now on.

    Returns the operator library, which has to be kept alive. PyTorch's `clone`, `to`, `pin_memory`,
    `zeros` and `full` end in the operators replaced here.
    """
    import torch
    from torch.optim import adam, sgd

    library = torch.library.Library("aten", "IMPL")
    for operator in (
        "copy_",
        "zero_",
        "fill_.Scalar",
        "fill_.Tensor",
        "mul_.Tensor",
        "add_.Tensor",
    ):
        kernel = torch.library.get_kernel(f"aten::{operator}", "CPU")
        second = operator in ("copy_", "fill_.Tensor", "mul_.Tensor", "add_.Tensor")
        library.impl(operator, _in_place(kernel, second), "CPU", with_keyset=True)
    for module, name in ((adam, "adam"), (sgd, "sgd")):
        setattr(module, name, _updating(getattr(module, name)))
    return library


def _in_place(kernel: Any, second: bool) -> Callable[..., Any]:
    """`kernel`, which writes its first argument, without effect if that is hollow. `second`: the
    second argument is a tensor, too.
    """
    import torch

    dtypes = {
        bool: torch.bool, int: torch.int64, float: torch.float64, complex: torch.complex128
    }  # fmt: skip

    def run(keys: Any, tensor: Any, *others: Any, **named: Any) -> Any:
        if hollow(tensor):
            return tensor
        # PyTorch converts a tensor that wraps a number to that number when it calls Python.
        if second and type(others[0]) in dtypes:
            number, *rest = others
            others = (torch.scalar_tensor(number, dtype=dtypes[type(number)]), *rest)
        return kernel.call_boxed(keys, tensor, *others, **named)

    return run


def _updating(function: Callable[..., None]) -> Callable[..., None]:
    """`function`, the functional form of an optimizer with a list per kind of tensor, without hollow parameters."""

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
