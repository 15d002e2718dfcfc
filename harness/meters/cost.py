"""Counts FLOPs and traffic of a step, operator by operator, while it runs.

Only operators that fusion cannot remove are counted: matrix products, attention, copies between
accelerator and host, collectives. Elementwise operators can be fused into them. A multiply and an
add count as two. Legend: B batch, H query heads, S queries, T keys, D head dim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils.flop_counter import flop_registry

from harness.cells.prediction import Cost

aten = torch.ops.aten
PRODUCTS = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm}
"""Matrix products; PyTorch's own formulas count them."""
ATTENTION = {
    "aten::_scaled_dot_product_flash_attention": 2,
    "aten::_scaled_dot_product_flash_attention_for_cpu": 2,
    "aten::_scaled_dot_product_flash_attention_backward": 5,
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": 5,
}
"""Operator -> number of matrix products over the visible query-key pairs. Each needs D multiply-adds per pair."""
COPIES = {aten.copy_, aten._to_copy}
FIELDS = tuple(Cost.model_fields)


class Meter:
    """Sums up the cost of operators."""

    def __init__(self, host: str) -> None:
        self._host = host
        self._total = dict.fromkeys(FIELDS, 0.0)

    def observe(
        self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any
    ) -> None:
        """Add the cost of `func`, which has run."""
        packet, name = getattr(func, "overloadpacket", None), func._name.partition(".")[0]
        if packet in PRODUCTS:
            self._add("matmul_flops", flop_registry[packet](*args, **kwargs, out_val=result))
            self._add("device_bytes", _bytes((args, result)))
        elif name in ATTENTION:
            self._add("attention_flops", ATTENTION[name] * _pair_flops(func, args, kwargs))
            self._add("device_bytes", _bytes((args, result)))
        elif packet in COPIES:
            self._copy(*(result, args[0]) if packet is aten._to_copy else args[:2])
        elif func.namespace in {"c10d", "_c10d_functional"}:
            self._add("link_bytes", _sent(name, args))

    def cost(self) -> Cost:
        """The total cost so far."""
        return Cost(**self._total)

    def _add(self, field: str, amount: float) -> None:
        self._total[field] += amount

    def _copy(self, into: Tensor, source: Tensor) -> None:
        to_host, from_host = (x.device.type == self._host for x in (into, source))
        if to_host != from_host:
            self._add("host_out_bytes" if to_host else "host_in_bytes", _bytes(source))


def _pair_flops(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> float:
    """FLOPs of one matrix product over all visible query-key pairs."""
    names = [argument.name for argument in func._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    batch, heads, queries, dim = given["query"].shape
    keys = given["key"].shape[2]
    causal = given.get("is_causal", False)
    pairs = queries * (queries + 1) / 2 if causal else queries * keys
    return float(2 * batch * heads * dim * pairs)


def _bytes(value: Any) -> int:
    """Bytes of all tensors in `value`."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, list | tuple):
        return sum(_bytes(each) for each in value)
    return 0


def _sent(name: str, args: Sequence[Any]) -> float:
    """Bytes that a rank sends to others in a collective of n ranks: (n - 1) / n of the largest
    argument, twice that for an all-reduce. A send counts in full, a receive not at all.
    """
    operation = name.partition("::")[2].replace("_", "")
    if operation.startswith("recv"):
        return 0.0
    groups = [arg for arg in args if type(arg).__name__ == "ScriptObject"]
    size = max((ProcessGroup.unbox(g).size() for g in groups[:1]), default=1)
    largest = max((_bytes(arg) for arg in args), default=0)
    if operation.startswith("send"):
        return float(largest)
    times = 2 if operation.startswith("allreduce") else 1
    return times * largest * (size - 1) / size
