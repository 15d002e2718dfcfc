"""Exact bytes of live tensors while a step runs, on real and on fake tensors alike.

Every tensor is born in an operator call, which a dispatch mode sees, and dies with its storage,
which a weak reference sees. So the live bytes after each operator are a count, not an estimate.
Views add nothing; a storage is counted once, whoever wraps it. What a kernel allocates and frees
inside one operator call (scratch) is invisible here and comes from a table, if one is given.
"""

from __future__ import annotations

import gc
import os
import sys
import sysconfig
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, wraps
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Scratch = Callable[[Any, tuple[Any, ...], Mapping[str, Any]], Mapping[str, int]]
"""(operator overload, args, kwargs) -> name -> bytes of what its kernel holds besides inputs and outputs."""

Observer = Callable[[Any, tuple[Any, ...], Mapping[str, Any], Any], None]
"""Told (operator overload, args, kwargs, result) of everything that ran."""

START = "start"
"""The phase before the first call of `Tracker.phase`."""


@dataclass(slots=True)
class Allocation:
    """One storage on one device."""

    nbytes: int
    """Size, rounded; the largest one if the storage was resized."""
    host: bool
    """Whether it lies in host memory."""
    category: str
    """`parameters`, `gradients`, `optimizer`, `activations`, `communication`, `scratch`, or what
    `adopt` was told."""
    phase: str
    """When it was allocated."""
    operator: str
    """What allocated it; `adopted` for what existed before."""
    shape: tuple[int, ...]
    """Of the first tensor seen on the storage."""
    dtype: str
    """Of that tensor."""
    location: str | None
    """`file:line` of the innermost frame outside PyTorch and the harness, where asked for. In
    backward, of the forward call whose gradient is computed, where that was seen."""


class Event(NamedTuple):
    """Allocation number `allocation` has `nbytes` from now on; 0 means it was freed."""

    allocation: int
    nbytes: int
    host: bool
    phase: str


@dataclass(frozen=True, slots=True)
class Peak:
    """The instant of a phase at which live tensors plus kernel scratch were largest."""

    live_bytes: int = 0
    """Live tensors."""
    scratch_bytes: int = 0
    """Held inside the kernel that ran at that instant."""
    event: int = 0
    """Events recorded up to it."""

    @property
    def nbytes(self) -> int:
        """Live and scratch: what an allocator would call allocated."""
        return self.live_bytes + self.scratch_bytes


class _Death(weakref.ref[torch.UntypedStorage]):
    """A weak reference that knows whose it was."""

    __slots__ = ("key",)
    key: int


@dataclass(slots=True)
class _Live:
    """A live storage."""

    death: _Death
    number: int
    nbytes: int
    allocation: Allocation


class Tracker:
    """Counts the bytes of live storages inside `with tracker:`.

    Tensors that exist before have to be adopted to count. Tensors on device type `host` are host
    memory, and so are those passed to `mark_host`; tensors on the meta device are nothing.
    Sizes are rounded up to `rounding` bytes (512 is CUDA's caching allocator). `events` keeps the
    stream of allocations, which `peak_live` needs; `explain` adds source lines and is slow.
    """

    def __init__(
        self,
        *,
        rounding: int = 1,
        host: str | None = None,
        scratch: Scratch | None = None,
        observer: Observer | None = None,
        events: bool = False,
        explain: bool = False,
    ) -> None:
        self.allocations: list[Allocation] = []
        """All allocations in order, if events are recorded."""
        self.events: list[Event] = []
        """What happened in order, if events are recorded."""
        self.operators: set[str] = set()
        """Every operator that ran."""
        self._rounding = rounding
        self._host_type = host
        self._scratch = scratch
        self._observer = observer
        self._record = events or explain
        self._explain = explain
        self._mode = _Mode(self)
        self._live: dict[int, _Live] = {}
        self._dead: deque[weakref.ref[torch.UntypedStorage]] = deque()
        self._bytes = {False: 0, True: 0}
        self._pending_scratch = 0
        self._scratch_numbers: list[int] = []
        self._phase = START
        self._peaks: dict[str, Peak] = {}
        self._host_peaks: dict[str, int] = {}
        self._lines: dict[int, str | None] = {}

    # --- what a caller tells ---

    def __enter__(self) -> Self:
        self._original_resize = torch.UntypedStorage.resize_
        torch.UntypedStorage.resize_ = self._watched_resize()  # type: ignore[method-assign, assignment]
        self._mode.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        self._mode.__exit__(*error)  # type: ignore[no-untyped-call]
        torch.UntypedStorage.resize_ = self._original_resize  # type: ignore[method-assign]
        self._settle()

    def adopt(self, tensors: Iterable[Tensor | None], category: str) -> None:
        """Count tensors that exist already, under `category`; rename the category of known ones."""
        self._settle()
        self._drain()
        for tensor in tensors:
            for part in _parts(tensor):
                known = self._live.get(part.untyped_storage()._cdata)
                if known is None:
                    self._add(part, category, "adopted", None)
                else:
                    known.allocation.category = category
        self._settle()

    def adopt_rest(self, category: str = "other") -> None:
        """Count every other tensor that this process holds: buckets and buffers of an engine."""
        self._drain()
        objects = [o for o in gc.get_objects() if issubclass(type(o), Tensor)]
        parts = [part for tensor in objects for part in _parts(tensor)]
        self.adopt([p for p in parts if p.untyped_storage()._cdata not in self._live], category)

    def phase(self, name: str) -> None:
        """Begin phase `name`, or go on with it; what is live now counts for its peak."""
        self._settle()
        self._drain()
        self._phase = name
        self._settle()

    def mark_host(self, tensor: Tensor) -> None:
        """`tensor`, fresh from its allocation, stands for host memory: move it over."""
        self._drain()
        for part in _parts(tensor):
            live = self._live[part.untyped_storage()._cdata]
            if not live.allocation.host:
                self._resize(live, 0)
                live.allocation.host = True
                self._resize(live, self._round(part.untyped_storage().nbytes()))

    # --- what it found ---

    @property
    def live_bytes(self) -> int:
        """Live now on the compute device."""
        self._settle()
        self._drain()
        return self._bytes[False]

    @property
    def live_host_bytes(self) -> int:
        """Live now in host memory."""
        self._settle()
        self._drain()
        return self._bytes[True]

    @property
    def peaks(self) -> dict[str, Peak]:
        """The peak of each phase on the compute device."""
        self._settle()
        return dict(self._peaks)

    @property
    def peak(self) -> Peak:
        """The highest of `peaks`."""
        return max(self.peaks.values(), key=lambda p: p.nbytes, default=Peak())

    @property
    def peak_bytes(self) -> int:
        """Live tensors plus scratch on the compute device, at their largest."""
        return self.peak.nbytes

    @property
    def phase_peaks(self) -> dict[str, int]:
        """`peak_bytes` by phase."""
        return {phase: peak.nbytes for phase, peak in self.peaks.items()}

    @property
    def host_phase_peaks(self) -> dict[str, int]:
        """Largest sum of live bytes in host memory by phase."""
        self._settle()
        return dict(self._host_peaks)

    @property
    def host_peak_bytes(self) -> int:
        """The highest of `host_phase_peaks`."""
        return max(self.host_phase_peaks.values(), default=0)

    def peak_live(self, phase: str | None = None) -> list[Allocation]:
        """What was live on the compute device at the peak (of `phase`), scratch included, largest first.

        Needs `events`.
        """
        assert self._record, "a tracker without events cannot tell what was live"
        self._settle()
        peak = self.peak if phase is None else self._peaks[phase]
        live: dict[int, int] = {}
        for event in self.events[: peak.event]:
            if event.host:
                continue
            if event.nbytes:
                live[event.allocation] = event.nbytes
            else:
                live.pop(event.allocation, None)
        return sorted((self.allocations[n] for n in live), key=lambda a: -a.nbytes)

    # --- how it counts ---

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run one operator and count what it made."""
        self._settle()
        result = func(*args, **kwargs)
        self._drain()
        if self._observer is not None:
            self._observer(func, args, kwargs, result)
        communicates = func.namespace in ("c10d", "_c10d_functional")
        self.operators.add(func._name)
        location = self._locate() if self._explain else None
        for tensor in _tensors(result):
            for part in _parts(tensor):
                storage = part.untyped_storage()
                known = self._live.get(storage._cdata)
                if known is not None:
                    self._resize(known, self._round(storage.nbytes()))
                    if communicates and known.allocation.category == "activations":
                        known.allocation.category = "communication"
                elif func._name == "aten::lift_fresh" or not _aliases(storage, args, kwargs):
                    default = "optimizer" if self._phase == "update" else "activations"
                    category = "communication" if communicates else default
                    self._add(part, category, func._name, location)
        if self._scratch is not None:
            self._begin_scratch(self._scratch(func, args, kwargs), func._name, location)
        return result

    def _round(self, nbytes: int) -> int:
        return -(-nbytes // self._rounding) * self._rounding

    def _add(self, tensor: Tensor, category: str, operator: str, location: str | None) -> None:
        if tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        death = _Death(storage, self._dead.append)
        death.key = storage._cdata
        allocation = Allocation(
            nbytes=0,
            host=tensor.device.type == self._host_type,
            category=category,
            phase=self._phase,
            operator=operator,
            shape=tuple(tensor.shape),
            dtype=str(tensor.dtype).removeprefix("torch."),
            location=location,
        )
        live = _Live(death, len(self.allocations), 0, allocation)
        self._live[death.key] = live
        if self._record:
            self.allocations.append(allocation)
        self._resize(live, self._round(storage.nbytes()))

    def _resize(self, live: _Live, nbytes: int) -> None:
        """The one place where live bytes change."""
        if nbytes == live.nbytes:
            return
        allocation = live.allocation
        self._bytes[allocation.host] += nbytes - live.nbytes
        live.nbytes = nbytes
        allocation.nbytes = max(allocation.nbytes, nbytes)
        if self._record:
            self.events.append(Event(live.number, nbytes, allocation.host, self._phase))

    def _drain(self) -> None:
        """Take the dead off the count. Deaths are queued, so a finalizer never races an operator."""
        while self._dead:
            death = self._dead.popleft()
            assert isinstance(death, _Death)
            self._resize(self._live[death.key], 0)
            del self._live[death.key]

    def _begin_scratch(
        self, tensors: Mapping[str, int], operator: str, location: str | None
    ) -> None:
        for name, nbytes in tensors.items():
            rounded = self._round(nbytes)
            self._pending_scratch += rounded
            if self._record:
                self._scratch_numbers.append(len(self.allocations))
                self.events.append(Event(len(self.allocations), rounded, False, self._phase))
                self.allocations.append(
                    Allocation(
                        rounded,
                        False,
                        "scratch",
                        self._phase,
                        f"{operator} ({name})",
                        (),
                        "",
                        location,
                    )
                )

    def _settle(self) -> None:
        """Compare the state after the last operator with the peaks.

        Done late, when the next operator begins: `mark_host` comes between the two.
        """
        live, host = self._bytes[False], self._bytes[True]
        peak = self._peaks.get(self._phase)
        if peak is None or live + self._pending_scratch > peak.nbytes:
            self._peaks[self._phase] = Peak(live, self._pending_scratch, len(self.events))
        if host > self._host_peaks.get(self._phase, -1):
            self._host_peaks[self._phase] = host
        if self._pending_scratch:
            self._pending_scratch = 0
            for number in self._scratch_numbers:
                self.events.append(Event(number, 0, False, self._phase))
            self._scratch_numbers.clear()

    def _watched_resize(self) -> Callable[[Any, int], Any]:
        """`UntypedStorage.resize_`, which no dispatch mode sees, with the count kept."""
        original = self._original_resize

        @wraps(original)
        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            self._settle()
            result = original(storage, size)
            self._drain()
            live = self._live.get(storage._cdata)
            if live is not None:
                self._resize(live, self._round(storage.nbytes()))
            return result

        return resize_

    def _locate(self) -> str | None:
        """Where the running operator was called; for a gradient, where its function was called.

        An operator that records a graph node is the first one after the node took its number.
        """
        here, by_engine = _source_line()
        if not by_engine:
            self._lines.setdefault(torch._C._autograd._get_sequence_nr() - 1, here)
            return here
        node: Any = torch._C._current_autograd_node()
        return here if node is None else self._lines.get(node._sequence_nr(), here)


_DEVICE = torch.ops.prim.device.default


class _Mode(TorchDispatchMode):
    """Shows every operator to a tracker."""

    def __init__(self, tracker: Tracker) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tracker = weakref.proxy(tracker)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is _DEVICE:  # more than half of all calls on fake tensors, and no kernel
            return func(*args)
        if any(_is_wrapper(t) for t in types):
            return NotImplemented  # the wrapper unwraps itself and comes back with plain tensors
        return self._tracker._run(func, args, kwargs or {})


@cache
def _is_wrapper(cls: type) -> bool:
    """Whether `cls` holds its data in other tensors, as DTensor does."""
    return hasattr(cls, "__tensor_flatten__")


def _parts(tensor: Tensor | None) -> Iterator[Tensor]:
    """The tensors that hold the data of `tensor`: itself, or what it wraps."""
    if tensor is None:
        return
    if not _is_wrapper(type(tensor)):
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    for name in names:
        part = getattr(tensor, name)
        if isinstance(part, Tensor):  # DTensor lists its mesh, too
            yield from _parts(part)


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors of an operator's arguments or results."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _aliases(
    storage: torch.UntypedStorage, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> bool:
    """Whether `storage` belongs to an argument, so that the operator did not allocate it."""
    key = storage._cdata
    return any(t.untyped_storage()._cdata == key for t in _tensors((args, tuple(kwargs.values()))))


_TORCH = str(Path(torch.__file__).parent) + os.sep
_STDLIB = sysconfig.get_paths()["stdlib"] + os.sep
_HARNESS = str(Path(__file__).resolve().parent) + os.sep
_ROOT = str(Path(__file__).resolve().parent.parent) + os.sep


@cache
def _display_name(file: str) -> str | None:
    """Short path of a source file, or None for PyTorch, the standard library and the harness."""
    installed = "-packages" + os.sep
    if file.startswith((_TORCH, _HARNESS, "<")):
        return None
    if installed in file:
        return file.rsplit(installed, 1)[1]
    return None if file.startswith(_STDLIB) else file.removeprefix(_ROOT)


def _source_line() -> tuple[str | None, bool]:
    """`file:line` of the innermost frame outside PyTorch and the harness, and whether autograd's engine is inside it."""
    by_engine = False
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = _display_name(frame.f_code.co_filename)
        if name is not None:
            return f"{name}:{frame.f_lineno}", by_engine
        by_engine = by_engine or frame.f_code.co_name == "_engine_run_backward"
        frame = frame.f_back
    return None, by_engine
