"""Allocations that are alive at the memory peak, from PyTorch's memory history."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from phantom_agent.reads import installed

MOST_EVENTS = 200_000
"""Maximum number of recorded events; older ones are dropped."""


def record() -> None:
    """Start to record the history, each event with its Python frames."""
    import torch

    torch.cuda.memory._record_memory_history(max_entries=MOST_EVENTS, stacks="python")


def by_address(
    snapshot: dict[str, Any], device: int
) -> dict[int, tuple[int, list[dict[str, Any]]]]:
    """Address -> (bytes, frames) of the blocks that are allocated in a snapshot."""
    return {
        block["address"]: (block["requested_size"], block.get("frames", []))
        for segment in snapshot["segments"]
        if segment["device"] == device
        for block in segment["blocks"]
        if block["state"].startswith("active")
    }


def alive(snapshot: dict[str, Any], device: int) -> list[tuple[int, list[dict[str, Any]]]]:
    """(bytes, frames) of the blocks that are allocated in a snapshot."""
    return list(by_address(snapshot, device).values())


def alive_at_peak(snapshot: dict[str, Any], device: int) -> list[tuple[int, list[dict[str, Any]]]]:
    """As `alive`, at the moment of the recorded history with the most requested bytes."""
    events = [
        e for e in snapshot["device_traces"][device] if e["action"] in ("alloc", "free_completed")
    ]
    now = by_address(snapshot, device)
    requested = most = sum(size for size, _ in now.values())
    when = len(events)
    for i in range(len(events) - 1, -1, -1):
        requested += events[i]["size"] * (1 if events[i]["action"] == "free_completed" else -1)
        if requested > most:
            most, when = requested, i
    held: dict[int, tuple[int, list[dict[str, Any]]]] = {}
    for event in events[:when]:
        if event["action"] == "alloc":
            held[event["addr"]] = (event["size"], event.get("frames", []))
        else:
            held.pop(event["addr"], None)
    # Add blocks from before the history that were still allocated at the peak.
    later = set()
    for event in events[when:]:
        if (
            event["action"] == "free_completed"
            and event["addr"] not in held
            and event["addr"] not in later
        ):
            held[event["addr"]] = (event["size"], [])
        later.add(event["addr"])
    for address, block in now.items():
        if address not in later:
            held.setdefault(address, block)
    return list(held.values())


def alive_between(
    before: dict[str, Any], after: dict[str, Any], device: int
) -> dict[int, tuple[int, list[dict[str, Any]]]]:
    """Address -> (bytes, frames) of the blocks that are allocated at the peak between two snapshots.

    The history must be recorded from the first snapshot to the second.
    """
    held = by_address(before, device)
    events = [
        e for e in after["device_traces"][device] if e["action"] in ("alloc", "free_completed")
    ]
    now = most = sum(size for size, _ in held.values())
    when = 0
    for i, event in enumerate(events):
        now += event["size"] * (1 if event["action"] == "alloc" else -1)
        if now > most:
            most, when = now, i + 1
    for event in events[:when]:
        if event["action"] == "alloc":
            held[event["addr"]] = (event["size"], event.get("frames", []))
        else:
            held.pop(event["addr"], None)
    return held


def grouped(
    held: Sequence[tuple[int, list[dict[str, Any]]]], most: int = 12
) -> list[dict[str, Any]]:
    """Allocations grouped by the line that made them, largest group first, at most `most` groups."""
    groups: dict[tuple[str, str], list[int]] = {}
    for size, frames in held:
        groups.setdefault(place(frames), []).append(size)
    ranked = sorted(groups.items(), key=lambda item: -sum(item[1]))
    return [
        {
            "where": where,
            "line": line,
            "bytes": sum(sizes),
            "tensors": len(sizes),
            "largest_bytes": max(sizes),
        }
        for (where, line), sizes in ranked[:most]
    ]


def place(frames: Sequence[dict[str, Any]]) -> tuple[str, str]:
    """The function or module that allocated, and `file:line`: the innermost frame outside torch."""
    import os

    import torch

    folder = os.path.dirname(torch.__file__)
    outside = [f for f in frames if not f["filename"].startswith((folder, "<"))]
    if not outside:
        return ("autograd or torch", "no Python line of the program")
    frame = next((f for f in outside if not installed(f["filename"])), outside[0])
    inner = outside[0]
    name = qualified(inner["filename"], inner["line"]) or inner["name"]
    line = f"{inner['filename']}:{inner['line']}"
    if frame is not inner:
        line += f" from {frame['filename']}:{frame['line']}"
    return (name, line)


@lru_cache(maxsize=4096)
def qualified(file: str, line: int) -> str | None:
    """`Class.function` around a line of a source file; None if the source is missing or the line is in no function."""
    functions = [
        (begin, end, name) for begin, end, name in functions_of(file) if begin <= line <= end
    ]
    return max(functions)[2] if functions else None


@lru_cache(maxsize=256)
def functions_of(file: str) -> tuple[tuple[int, int, str], ...]:
    """First line, last line and qualified name of each function in a source file."""
    try:
        with open(file) as source:
            tree = ast.parse(source.read())
    except (OSError, SyntaxError, ValueError):
        return ()
    found: list[tuple[int, int, str]] = []

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
                name = f"{prefix}{child.name}"
                if not isinstance(child, ast.ClassDef):
                    found.append((child.lineno, child.end_lineno or child.lineno, name))
                visit(child, f"{name}.")
            else:
                visit(child, prefix)

    visit(tree, "")
    return tuple(found)
