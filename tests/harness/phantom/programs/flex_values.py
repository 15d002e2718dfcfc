"""Run code that `flex_code` copied on a CPU, under Triton's interpreter, and compare it with core `sdpa` in fp64.

It prints the relative errors of the output and of the gradients of query, key, value and sinks.
"""

import json
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import torch
import triton
import triton.language as tl
from torch._inductor import async_compile
from torch._inductor.codecache import PyCodeCache
from torch._inductor.runtime import triton_helpers, triton_heuristics
from torch.nn.attention import flex_attention

from alst_impl.config import Spec
from alst_impl.layout import Layout
from alst_impl.ops.attention import flex
from alst_impl.ops.attention.cores.base import load_core
from alst_impl.ops.attention.variant import Variant

folder, case = Path(sys.argv[1]), json.loads(sys.argv[2])


@triton.jit
def tanh(x: tl.tensor) -> tl.tensor:
    """As CUDA's."""
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@triton.jit
def exp(x: tl.tensor) -> tl.tensor:
    """As CUDA's."""
    return tl.exp(x)


@triton.jit
def log1p(x: tl.tensor) -> tl.tensor:
    """As CUDA's."""
    return tl.log(1.0 + x)


class Kernel:
    """A kernel that the generated code launches."""

    def __init__(self, kind: str, function: Any) -> None:
        self.kind, self.function = kind, function

    def run(self, *given: Any, stream: int) -> None:
        """Run it with `given`, which end with the grid of a template, or with the numbers of elements."""
        if self.kind == "template":
            *arguments, x, y, z = given
            self.function[x, y, z](*arguments)
            return
        sizes = [name for name in ("XBLOCK", "YBLOCK") if name in self.function.arg_names]
        ends = given[-2:-1] if self.kind == "persistent_reduction" else given[-len(sizes) :][::-1]
        grid = [-(-end // 64) for end in ends]
        self.function[*grid](*given, **dict.fromkeys(sizes, 64))


class Compiler(async_compile.AsyncCompile):
    """In place of the one that compiles kernels for a device."""

    def triton(self, name: str, source: str, device_str: str) -> Kernel:
        """The kernel `name` of a module with text `source`."""
        found: Kernel = getattr(PyCodeCache.load(source), name)
        return found

    def wait(self, scope: dict[str, Any]) -> None:
        """There is nothing to wait for."""


def decorator(kind: str) -> Callable[..., Any]:
    """A decorator with arguments, in place of those that choose how a kernel is launched."""
    return lambda **_: partial(Kernel, kind)


for kind in ("template", "pointwise", "persistent_reduction"):
    setattr(triton_heuristics, kind, decorator(kind))
triton_helpers.set_driver_to_gpu = lambda: None
triton_helpers.libdevice = SimpleNamespace(tanh=tanh, exp=exp, log1p=log1p)
async_compile.AsyncCompile = Compiler
torch.cuda._DeviceGuard = lambda _: nullcontext()
torch.cuda.set_device = lambda _: None
torch._C._cuda_getCurrentRawStream = lambda _: 0
torch._C._dynamo.guards._empty_strided_cuda = torch._C._dynamo.guards._empty_strided_cpu
flex_attention._validate_device = lambda *_: None  # which refuses gradients on a CPU

texts = [path.read_text() for path in folder.iterdir()]


def code(template: bool, backward: bool) -> Any:
    """The generated function with or without the kernel of attention, of forward or of backward."""
    (text,) = (
        text
        for text in texts
        if ("triton_tem_" in text, "tangents_1" in text) == (template, backward)
    )
    return PyCodeCache.load(text).call


class Generated(torch.autograd.Function):
    """What the generated code computes, from and to the values that dynamo's graph has."""

    @staticmethod
    def forward(ctx: Any, template: bool, outputs: int, *inputs: Any) -> Any:
        found = code(template, backward=False)(list(inputs))
        ctx.template, ctx.rest = template, found[outputs:]
        return tuple(found[:outputs])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        numbers = [x for x in ctx.rest if not isinstance(x, torch.Tensor)]
        tensors = [x for x in ctx.rest if isinstance(x, torch.Tensor)]
        found = code(ctx.template, backward=True)([*numbers, *tensors, *grads])
        return None, None, *found


def generated(template: bool, graph: Any, _: Any) -> Any:
    """A backend of torch.compile that takes code which was generated for the same graph."""
    outputs = len(graph.graph.output_node().args[0])
    return lambda *inputs: Generated.apply(template, outputs, *inputs)


for name, function, template in (
    ("_without_sinks", flex.without_sinks, True),
    ("_with_sinks", flex.with_sinks, False),
):
    backend = partial(generated, template)
    setattr(flex, name, torch.compile(function, backend=backend, fullgraph=True))

torch.manual_seed(1)
shapes = [(len(case["documents"]), heads, case["seqlen"], 16) for heads in (2, 1, 1)]
drawn = [*(torch.randn(shape) for shape in shapes), torch.tensor([-1.0, 2.0])]
layout = Layout(case["seqlen"], documents=case["documents"])
core = load_core(Spec(name="sdpa", options={"pattern": case["pattern"]}))
results = []
for dtype in (torch.float32, torch.float64):
    tensors = [x.to(dtype, copy=True).requires_grad_() for x in drawn]
    variant = Variant(0.3, case["window"], softcap=case["softcap"], sinks=tensors[3])
    if dtype == torch.float32:
        out = flex.attend(*tensors[:3], variant, case["documents"], core.pattern)
    else:
        out = core(*tensors[:3], layout=layout, variant=variant)
    out.backward(torch.linspace(-1, 2, out.numel(), dtype=dtype).view_as(out))
    results.append([out.detach(), *(x.grad for x in tensors)])
print(json.dumps([float((a - b).norm() / b.norm()) for a, b in zip(*results, strict=True)]))
