"""Python access to the stub runtime of this process."""

from __future__ import annotations

import ctypes
import os

READER = ctypes.CFUNCTYPE(None, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p)
NAME_COUNT = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_uint64)
NAMES = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p)


def library() -> ctypes.CDLL:
    """libphantom, which was loaded before the program began."""
    found = ctypes.CDLL(os.path.join(os.environ["PHANTOM_LIBRARIES"], "libphantom.so"))
    for name in (
        "host_peak",
        "pageable_peak",
        "num_launches",
        "num_matmuls",
        "matmul_flops",
        "known_reads",
        "unknown_reads",
    ):
        getattr(found, f"phantom_{name}").restype = ctypes.c_uint64
    return found


def kernels() -> dict[str, int]:
    """Mangled name of each kernel -> number of launches."""
    found: dict[str, int] = {}

    def add(name: bytes, launches: int) -> None:
        found[name.decode()] = found.get(name.decode(), 0) + launches

    library().phantom_each_kernel(NAME_COUNT(add))
    return found


def refusals() -> list[str]:
    """The refused functions, each with its library."""
    found: list[str] = []

    def add(owner: bytes, function: bytes) -> None:
        found.append(f"{function.decode()} ({owner.decode()})")

    library().phantom_each_refusal(NAMES(add))
    return sorted(found)


def first_cudart() -> str | None:
    """The first libcudart that is mapped in this process."""
    with open("/proc/self/maps") as maps:
        return next((line.split()[-1] for line in maps if "/libcudart.so" in line), None)
