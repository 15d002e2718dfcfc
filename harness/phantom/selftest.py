"""Self-test on a phantom device, run once per build: checks that the runtime works with this
PyTorch. Silent on success.
"""

from __future__ import annotations

import ctypes
import os
import sys


def check() -> list[str]:
    """The failed checks."""
    import torch

    folder = os.environ["PHANTOM_LIBRARIES"]
    found = []
    with open("/proc/self/maps") as maps:
        runtime = next(line.split()[-1] for line in maps if "/libcudart.so" in line)
    if os.path.realpath(os.path.dirname(runtime)) != os.path.realpath(folder):
        found.append(f"another CUDA runtime is loaded first: {runtime}")
    for value, dtype in (
        (7, torch.int64),
        (7, torch.int32),
        (1.5, torch.float32),
        (1.5, torch.bfloat16),
        (True, torch.bool),
    ):
        if torch.full((5,), value, dtype=dtype, device="cuda").tolist() != [value] * 5:
            found.append(f"torch.full of {dtype} does not read back")
    made = torch.full((5,), 7, device="cuda")
    if made.add_(1).tolist() != [0] * 5:
        found.append("what a kernel made is taken to be known")
    name = next(n for n in os.listdir(folder) if n.startswith("libcudart.so."))
    if ctypes.CDLL(os.path.join(folder, name)).cudaIpcGetMemHandle() == 0:
        found.append("a function that nobody looked at succeeds")
    row = os.environ["PHANTOM_DEVICE"]
    properties = torch.cuda.get_device_properties(0)
    if (
        f";total={properties.total_memory};" not in row
        or f";multiprocessors={properties.multi_processor_count};" not in row
    ):
        found.append("device properties do not have the layout that PyTorch reads")
    return found


if __name__ == "__main__":
    if broken := check():
        sys.exit("; ".join(broken))
