"""Counts FLOPs and traffic of a step, operator by operator, while it runs.

Matrix products, attention, copies between accelerator and host and collectives are what fusion cannot
remove. All other operators of the accelerator are counted by the bytes that they read and write. A
multiply and an add count as two. Legend: B batch, H query heads, S queries, T keys, D head dim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils.flop_counter import flop_registry

from harness.cells.prediction import Cost

aten = torch.ops.aten
PRODUCTS = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm}
"""Matrix products; PyTorch's own formulas count them."""
GROUPED = aten._grouped_mm
"""Products of routed tokens with the weights of their experts; PyTorch has no formula for it."""
ATTENTION = {
    f"aten::_scaled_dot_product_{kernel}{suffix}": products
    for kernel in (
        "flash_attention",
        "flash_attention_for_cpu",
        "efficient_attention",
        "cudnn_attention",
    )
    for suffix, products in (("", 2), ("_backward", 5))
}
"""Operator -> number of matrix products over the visible query-key pairs. Each needs D multiply-adds per pair."""
COPIES = {aten.copy_, aten._to_copy}
UNREAD = {aten.empty, aten.empty_strided, aten.empty_like, aten.new_empty, aten.new_empty_strided}
"""Operators that allocate and launch nothing."""
FIELDS = tuple(Cost.model_fields)


class Meter:
    """Sums up the cost of operators."""

    def __init__(self, host: str, node: int) -> None:
        """`host` is the device type of host memory, `node` the number of accelerators of a node."""
        self._host = host
        self._node = node
        self._total = dict.fromkeys(FIELDS, 0.0)

    def observe(
        self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any
    ) -> None:
        """Add the cost of `func`, which has run."""
        packet, name = getattr(func, "overloadpacket", None), func._name.partition(".")[0]
        if packet in PRODUCTS:
            self._add("matmul_flops", flop_registry[packet](*args, **kwargs, out_val=result))
            self._products(args, result)
        elif packet is GROUPED:
            self._add("matmul_flops", _grouped_flops(*args[:2]))
            self._products(args, result)
        elif name in ATTENTION:
            self._add("attention_flops", ATTENTION[name] * _pair_flops(func, args, kwargs))
            self._products(args, result)
        elif func.namespace in {"c10d", "_c10d_functional"}:
            sent, group = _sent(name, args)
            nodes = {rank // self._node for rank in dist.get_process_group_ranks(group)}
            self._add("link_bytes", sent)
            self._add("network_bytes", sent if len(nodes) > 1 else 0.0)
        elif packet in COPIES and self._copied(
            *(result, args[0]) if packet is aten._to_copy else args[:2]
        ):
            pass
        elif packet not in UNREAD and not _is_view(func):
            moved = _bytes((args, list(kwargs.values()), result), without=self._host)
            self._add("pointwise_bytes", moved)
            self._add("launches", 1 if moved else 0)

    def cost(self) -> Cost:
        """The total cost so far."""
        return Cost(**self._total)

    def _add(self, field: str, amount: float) -> None:
        self._total[field] += amount

    def _products(self, args: Sequence[Any], result: Any) -> None:
        self._add("device_bytes", _bytes((args, result)))
        self._add("launches", 1)

    def _copied(self, into: Tensor, source: Tensor) -> bool:
        """Whether the copy is between accelerator and host; if so, it is added."""
        to_host, from_host = (x.device.type == self._host for x in (into, source))
        if to_host != from_host:
            self._add("host_out_bytes" if to_host else "host_in_bytes", _bytes(source))
        return to_host != from_host


def _is_view(func: Any) -> bool:
    """Whether `func` returns another view of an argument and moves nothing."""
    returned = [each.alias_info for each in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in returned)


def _grouped_flops(left: Tensor, right: Tensor) -> float:
    """FLOPs of a grouped product. Each row of a matrix [M, K] meets one of the groups; if both are matrices,
    K is divided into groups.
    """
    groups = left.shape[0] if left.ndim == right.ndim == 3 else 1
    return float(2 * groups * left.shape[-2] * left.shape[-1] * right.shape[-1])


def _pair_flops(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> float:
    """FLOPs of one matrix product over all visible query-key pairs."""
    names = [argument.name for argument in func._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    batch, heads, queries, dim = given["query"].shape
    keys = given["key"].shape[2]
    causal = given.get("is_causal", False)
    pairs = queries * (queries + 1) / 2 if causal else queries * keys
    return float(2 * batch * heads * dim * pairs)


def _bytes(value: Any, without: str | None = None) -> int:
    """Bytes of all tensors in `value`, but for those on the device type `without`."""
    if isinstance(value, Tensor):
        return 0 if value.device.type == without else value.numel() * value.element_size()
    if isinstance(value, list | tuple):
        return sum(_bytes(each, without) for each in value)
    return 0


def _sent(name: str, args: Sequence[Any]) -> tuple[float, ProcessGroup | None]:
    """Bytes that a rank sends to others in a collective of n ranks, and its group: (n - 1) / n of the
    largest argument, twice that for an all-reduce. A send counts in full, a receive not at all.
    """
    operation = name.partition("::")[2].replace("_", "")
    boxed = [arg for arg in args if type(arg).__name__ == "ScriptObject"]
    group = ProcessGroup.unbox(boxed[0]) if boxed else None
    if operation.startswith("recv"):
        return 0.0, group
    largest = max((_bytes(arg) for arg in args), default=0)
    if operation.startswith("send"):
        return float(largest), group
    size = 1 if group is None else group.size()
    times = 2 if operation.startswith("allreduce") else 1
    return times * largest * (size - 1) / size, group
