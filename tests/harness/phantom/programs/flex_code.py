"""Compile core `flex` for a GPU, forward and backward, and copy the code that TorchInductor made into a folder."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from torch._inductor.codecache import PyCodeCache

from alst_impl.config import Spec
from alst_impl.layout import Layout
from alst_impl.ops.attention.cores.base import load_core
from alst_impl.ops.attention.variant import Variant

folder, case = Path(sys.argv[1]), json.loads(sys.argv[2])
load = PyCodeCache.load_by_key_path


def noting(key: str, path: str, *more: Any, **named: Any) -> Any:
    """Load a file of code, and copy it if it calls kernels."""
    if "class Runner" in Path(path).read_text():
        shutil.copy(path, folder)
    return load(key, path, *more, **named)


PyCodeCache.load_by_key_path = noting
torch.compiler.config.force_disable_caches = True
shapes = [(len(case["documents"]), heads, case["seqlen"], 16) for heads in (2, 1, 1)]
query, key, value = (torch.zeros(shape, device="cuda", requires_grad=True) for shape in shapes)
sinks = torch.zeros(2, device="cuda", requires_grad=True)
variant = Variant(0.3, case["window"], softcap=case["softcap"], sinks=sinks)
layout = Layout(case["seqlen"], documents=case["documents"])
core = load_core(Spec(name="flex", options={"pattern": case["pattern"]}))
core(query, key, value, layout=layout, variant=variant).sum().backward()
