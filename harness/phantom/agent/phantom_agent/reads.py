"""Reads of device memory with unknown values: counted by place, and answered at reviewed sites."""

from __future__ import annotations

import ctypes
import linecache
import os
import struct
import sys
from types import FrameType
from typing import Any

from phantom_agent import runtime

SMALL = 16
"""Largest read, in bytes, that can decide a program's control flow."""


class Reads:
    """Counts unknown reads by place, and answers those at reviewed sites."""

    def __init__(self, sites: list[dict[str, Any]]) -> None:
        self.sites = sites
        self.found: dict[tuple[str, int, str, int], dict[str, Any]] = {}

    def hear(self, address: int, size: int, to: int) -> None:
        """Handle a read of `size` bytes. The result at `to` is zeros unless this writes an answer there."""
        frame = innermost()
        name = frame.f_code.co_qualname if frame else "no Python line"
        file, line = (frame.f_code.co_filename, frame.f_lineno) if frame else ("", 0)
        key = (file, line, name, size)
        if key not in self.found:
            # A condition may span several lines, and the frame reports the first.
            text = "".join(linecache.getline(file, line + i) for i in range(4))
            site = self.site(file, name, text)
            self.found[key] = {
                "file": file,
                "line": line,
                "function": name,
                "bytes": size,
                "count": 0,
                "caller": caller(frame),
                "answer": site and site["answer"],
                "why": site and site["why"],
            }
        read = self.found[key]
        read["count"] += 1
        if read["answer"] and size <= SMALL:
            value = encoded(read["answer"], size)
            ctypes.memmove(to, value, len(value))

    def site(self, file: str, function: str, text: str) -> dict[str, Any] | None:
        """The reviewed site that matches a read in `function` of `file`, at the lines `text`; None
        if no site matches.
        """
        names = (function, function.rpartition(".")[2], "*")
        for site in self.sites:
            if (
                file.endswith(site["file"])
                and site["function"] in names
                and (site["line"] or "") in text
            ):
                return site
        return None


def encoded(answer: Any, size: int) -> bytes:
    """`answer` as `size` bytes: a float in IEEE format, an integer or bool in two's complement."""
    if isinstance(answer, float):
        return struct.pack({4: "<f", 8: "<d"}[size], answer)
    return int(answer).to_bytes(size, "little", signed=answer < 0)


PASSING = (
    "/torch/_ops.py",
    "/torch/overrides.py",
    "/torch/_compile.py",
    "/torch/_dynamo/eval_frame.py",
)
"""Path suffixes of files that only pass a call on."""
MODES = ("__torch_function__", "__torch_dispatch__")


def innermost() -> FrameType | None:
    """The innermost Python frame outside this package and outside functions that only pass a call on."""
    frame: FrameType | None = sys._getframe()
    own = os.path.dirname(__file__)
    while frame is not None and (
        frame.f_code.co_filename.startswith(own)
        or frame.f_code.co_filename.endswith(PASSING)
        or frame.f_code.co_name in MODES
    ):
        frame = frame.f_back
    return frame


def caller(frame: FrameType | None) -> str | None:
    """The nearest `file:line` outside installed packages; None if that is `frame` itself."""
    first = frame
    while frame is not None and installed(frame.f_code.co_filename):
        frame = frame.f_back
    if frame is None or frame is first:
        return None
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def installed(file: str) -> bool:
    """Whether a source file belongs to an installed package or to Python itself."""
    import torch

    folder = os.path.dirname(os.path.dirname(torch.__file__))
    return "site-packages" in file or file.startswith((folder, sys.base_prefix, "<"))


def watch(sites: list[dict[str, Any]]) -> Reads:
    """Start to watch unknown reads, answered at the reviewed `sites`."""
    reads = Reads(sites)
    heard = runtime.READER(reads.hear)
    runtime.library().phantom_on_read(heard)
    reads.callback = heard  # type: ignore[attr-defined]  # alive as long as it can be called
    return reads
