"""Imports all slow packages once, so that forked processes inherit them.

Importing this module prepares the process for forking ranks on a CPU machine: it uses one thread, and DeepSpeed
does not compile operators that gloo does not need.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from pathlib import Path

# OpenMP and DeepSpeed read these variables at import, so they are set before the imports below.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
# All environments of a user share DeepSpeed's default folder and rebuild each other's operators in it.
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))
import torch
import torch.distributed.fsdp
import torch.testing._internal.distributed.fake_pg
import transformers.masking_utils
import transformers.models.auto.modeling_auto
import transformers.models.gemma3.modeling_gemma3
import transformers.models.llama.modeling_llama
import transformers.models.mistral.modeling_mistral
import transformers.models.qwen3.modeling_qwen3
import transformers.models.qwen3_moe.modeling_qwen3_moe  # noqa: F401

with contextlib.suppress(ImportError):  # an extra
    import peft  # noqa: F401
with contextlib.suppress(ImportError):  # an extra
    import deepspeed.ops
    import deepspeed.runtime.zero.muon.muon_optimizer

    # Compiling this operator takes a minute or more; without it DeepSpeed's collectives use gloo.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
torch.set_num_threads(1)
# A fork renews PyTorch's thread pool at its first use. Two threads that use it first find none ("Invalid thread
# pool!", ATen/ParallelOpenMP.cpp), so it is used here, where there is one thread.
os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))
# Imported modules hold half a million objects. Freezing them keeps the garbage collector of a forked rank from
# scanning them, which costs a second when DeepSpeed starts.
gc.collect()
gc.freeze()
