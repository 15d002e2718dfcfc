"""Agent inside a program on phantom devices: watches unknown reads and memory, and reports when the process ends.

At first it imports only the standard library, so that any program can run with it. It imports torch
after the program has.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


class _AfterImport(importlib.abc.MetaPathFinder):
    """Calls `call` when module `name` has been imported."""

    def __init__(self, name: str, call: Callable[[], None]) -> None:
        self.name, self.call = name, call

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            self.call()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _torch_imported() -> None:
    from phantom_agent import alone, host, watch

    watch.begin()
    if "PHANTOM_HOLLOW_HOST" in os.environ:
        host.leave_large_untouched()
    if "PHANTOM_WORLD" in os.environ:
        alone.stand_for_all()
    if "PHANTOM_LAUNCHED" in os.environ:
        sys.meta_path.insert(
            0, _AfterImport("torch.distributed.launcher.api", alone.launch_one_rank)
        )


def install() -> None:
    """Start the agent when the program imports torch. Does nothing in a process outside a session."""
    if "PHANTOM_SESSION" in os.environ:
        sys.meta_path.insert(0, _AfterImport("torch", _torch_imported))
