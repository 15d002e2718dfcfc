"""Every operator of a simulated GPU step is one kernel on CUDA: nothing there decomposes further.

An operator that CUDA has no kernel for would be traced whole here and run as several there, with
temporaries that no count shows.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torchgen
import yaml

from alst_impl.config import Spec, TrainConfig
from harness.depth import at_depth
from harness.worlds.sim import simulate

NATIVE = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
"""PyTorch's own table of operators and their kernels, as installed."""
ALLOCATES_ITS_RESULT = "CompositeExplicitAutograd"
"""Dispatch keys that begin so: one function for all devices, on top of factories and views."""
METHODS: list[dict[str, Any]] = [
    {"name": "baseline"},
    {"name": "alst", "sp": 4},
    {"name": "mst"},
    {"name": "usp", "cp": 2, "sp": 2},
    {"name": "alst_recipe", "sp": 4},
    {"name": "alst_recipe", "sp": 4, "tile_mlp": False, "offload": False},
]


@cache
def native_functions() -> dict[str, dict[str, Any]]:
    """The entries by operator name, overload included."""
    # The safe loader in C: `yaml.safe_load` takes ten times as long for these 16,000 lines.
    entries = yaml.load(NATIVE.read_text(), Loader=yaml.CSafeLoader)
    return {f"aten::{entry['func'].partition('(')[0]}": entry for entry in entries}


def runs_as_one_kernel(operator: str) -> bool:
    """Whether CUDA has a kernel of its own for `operator`."""
    namespace = operator.partition("::")[0]
    if namespace in {"prim", "profiler"} or operator == "aten::promote_types":
        return True  # asks for a device or a dtype, or marks a range: no tensor is made
    if namespace != "aten":
        # Collectives, and FSDP's copies in and out of their buffers: registered per device.
        return torch._C._dispatch_has_kernel_for_dispatch_key(operator, "CUDA")
    entry = native_functions()[operator]
    if "structured_delegate" in entry:
        return runs_as_one_kernel(f"aten::{entry['structured_delegate']}")
    if "ufunc_inner_loop" in entry:
        return True  # generated for CPU and CUDA
    keys = {key.strip() for keys in entry.get("dispatch", {}) for key in keys.split(",")}
    return "CUDA" in keys or any(key.startswith(ALLOCATES_ITS_RESULT) for key in keys)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: "-".join(map(str, m.values())))
def test_traced_operators_are_cuda_kernels(method: dict[str, Any]) -> None:
    """Forward and backward of a step at GPU settings."""
    train = TrainConfig(
        model="llama3.1-8b",
        method=Spec(**method),
        engine=Spec(name="fsdp2"),
        seqlen=32_768,
        world_size=4,
        dtype="bfloat16",
    )
    operators = simulate(at_depth(train, 2)).operators
    assert "aten::_scaled_dot_product_flash_attention_backward" in operators
    assert [o for o in sorted(operators) if not runs_as_one_kernel(o)] == []


@pytest.mark.parametrize("operator", ["aten::scaled_dot_product_attention", "aten::matmul"])
def test_composites_are_found_out(operator: str) -> None:
    """What PyTorch takes apart on its own is no kernel."""
    assert not runs_as_one_kernel(operator)
