"""Runs a function again with the random numbers and the autocast of its first run.

What backward recomputes must be the same computation as in forward. Like `torch.utils.checkpoint`, this
restores the states of PyTorch's generators, and autocast.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import torch

States = list[bytes]
"""One state for each generator of `_generators`."""


class FirstRun:
    """Context of a computation to repeat: `with FirstRun(device) as first: ...`, then `first.again()`."""

    def __init__(self, device: torch.device) -> None:
        """`device` computes. The CPU's generator and autocast are recorded as well."""
        self._device = device
        self._autocasts = _autocasts(device)
        self._states: States | None = None

    def __enter__(self) -> FirstRun:
        self._states = _states(self._device)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._states == _states(self._device):  # nothing random ran
            self._states = None

    @property
    def random(self) -> bool:
        """Whether the computation drew random numbers, once it has run."""
        return self._states is not None

    def again(self) -> Again:
        """A repetition from the beginning."""
        return Again(self._device, self._autocasts, self._states)


class Again:
    """One repetition, in any number of parts, in the order of the first run."""

    def __init__(
        self, device: torch.device, autocasts: list[dict[str, Any]], states: States | None
    ) -> None:
        self._device, self._autocasts, self._states = device, autocasts, states

    @contextlib.contextmanager
    def part(self) -> Iterator[None]:
        """Context that draws the first run's next random numbers, under its autocast.

        Afterwards the generators are as if the block had not run, so later draws do not depend on it.
        """
        with contextlib.ExitStack() as stack:
            for autocast in self._autocasts:
                stack.enter_context(torch.autocast(**autocast))
            if self._states is None:
                yield
                return
            outside = _states(self._device)
            _restore(self._device, self._states)
            try:
                yield
            finally:
                self._states = _states(self._device)
                _restore(self._device, outside)


@contextlib.contextmanager
def drawing(device: torch.device, *name: object) -> Iterator[None]:
    """Context whose random numbers, on `device` and on the CPU, follow from `name` alone.

    Afterwards the generators are as if the block had not run.
    """
    outside = _states(device)
    digest = hashlib.sha256(repr(name).encode()).digest()
    for generator in _generators(device):
        generator.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    try:
        yield
    finally:
        _restore(device, outside)


@contextlib.contextmanager
def without_autocast(device: torch.device) -> Iterator[None]:
    """Context without autocast, for backward: its operations use the dtypes that forward used."""
    with contextlib.ExitStack() as stack:
        for autocast in _autocasts(device):
            stack.enter_context(torch.autocast(**{**autocast, "enabled": False}))
        yield


def _autocasts(device: torch.device) -> list[dict[str, Any]]:
    """Arguments of `torch.autocast` that reproduce its current state on `device` and on the CPU."""
    return [
        {
            "device_type": kind,
            "enabled": torch.is_autocast_enabled(kind),
            "dtype": torch.get_autocast_dtype(kind),
            "cache_enabled": torch.is_autocast_cache_enabled(),
        }
        for kind in dict.fromkeys((device.type, "cpu"))
        if torch.amp.is_autocast_available(kind)
    ]


def _generators(device: torch.device) -> list[torch.Generator]:
    """PyTorch's default generators of the CPU and of `device`."""
    if device.type in ("cpu", "meta"):
        return [torch.default_generator]
    module = torch.get_device_module(device)
    return [torch.default_generator, module.default_generators[device.index]]


def _states(device: torch.device) -> States:
    # As bytes (5 KB and 16 bytes): comparing tensors would be an operation, which a dispatch mode such as a
    # memory tracker would see.
    states = [generator.get_state() for generator in _generators(device)]
    return [ctypes.string_at(state.data_ptr(), state.numel()) for state in states]


def _restore(device: torch.device, states: States) -> None:
    for generator, state in zip(_generators(device), states, strict=True):
        generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))
