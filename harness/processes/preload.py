"""Everything slow to import, imported once and inherited by forked processes.

Importing this module prepares the process for forking ranks on a CPU machine: one thread, and
DeepSpeed held back from compiling operators that gloo does not need.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from pathlib import Path

# Read by OpenMP and DeepSpeed as they load, so they are set before the imports below.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
# DeepSpeed's default is shared by all environments of a user, which rebuild each other's operators.
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

    # Compiling it takes a minute or more; without it DeepSpeed's collectives go through gloo.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
torch.set_num_threads(1)
# Half a million objects of imported modules: a forked rank need not search them for garbage, which
# takes DeepSpeed's start a second.
gc.collect()
gc.freeze()
