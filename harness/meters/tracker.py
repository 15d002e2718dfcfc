"""Exact bytes of live tensors while a step runs.

Operators create tensors, and a dispatch mode sees every operator. A weak reference sees when a
storage is freed. So the live bytes after each operator are counted, not estimated. Views add
nothing, and a storage counts once for all tensors that share it. Memory that a kernel allocates and
frees within one operator is not visible.
"""

from __future__ import annotations

import gc
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

START = "start"
"""The phase before the first call of `Tracker.phase`."""


class _Death(weakref.ref[torch.UntypedStorage]):
    """A weak reference that keeps the key of its storage."""

    __slots__ = ("key",)
    key: int


@dataclass(slots=True)
class _Live:
    """A live storage."""

    death: _Death
    nbytes: int = 0
    host: bool = False


class Tracker:
    """Counts the bytes of live storages inside `with tracker:`.

    Tensors that already exist count only after `adopt`. Tensors passed to `mark_host` are host
    memory and count separately. Tensors on the meta device do not count.
    """

    def __init__(self) -> None:
        self.operators: set[str] = set()
        """Every operator that ran."""
        self._mode = _Mode(self)
        self._live: dict[int, _Live] = {}
        self._dead: deque[weakref.ref[torch.UntypedStorage]] = deque()
        self._bytes = {False: 0, True: 0}
        self._phase = START
        self._peaks: dict[str, int] = {}
        self._host_peak = 0

    # --- input from the caller ---

    def __enter__(self) -> Self:
        self._original_resize = torch.UntypedStorage.resize_
        torch.UntypedStorage.resize_ = _watched(self, self._original_resize)  # type: ignore[method-assign, assignment]
        self._mode.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._mode.__exit__(*error)
        torch.UntypedStorage.resize_ = self._original_resize  # type: ignore[method-assign]
        self._settle()

    def adopt(self, tensors: Iterable[Tensor | None] | None = None) -> None:
        """Count tensors that already exist; None: all of this process, such as an engine's buckets and buffers."""
        if tensors is None:
            tensors = [o for o in gc.get_objects() if issubclass(type(o), Tensor)]
        self._settle()
        self._drain()
        for tensor in tensors:
            for part in _parts(tensor):
                if part.untyped_storage()._cdata not in self._live:
                    self._add(part)
        self._settle()

    def phase(self, name: str) -> None:
        """Begin or resume phase `name`. Live bytes count towards its peak from now on."""
        self._settle()
        self._drain()
        self._phase = name
        self._settle()

    def mark_host(self, tensor: Tensor) -> None:
        """Count `tensor`, which was just allocated, as host memory."""
        self._drain()
        for part in _parts(tensor):
            storage = part.untyped_storage()
            live = self._live[storage._cdata]
            self._resize(live, 0)
            live.host = True
            self._resize(live, storage.nbytes())

    # --- results ---

    @property
    def live_bytes(self) -> int:
        """Live bytes on the compute device."""
        self._settle()
        self._drain()
        return self._bytes[False]

    @property
    def phase_peaks(self) -> dict[str, int]:
        """Peak of live bytes on the compute device, by phase."""
        self._settle()
        return dict(self._peaks)

    @property
    def peak_bytes(self) -> int:
        """The highest of `phase_peaks`."""
        return max(self.phase_peaks.values())

    @property
    def host_peak_bytes(self) -> int:
        """Peak of live bytes in host memory."""
        self._settle()
        return self._host_peak

    # --- counting ---

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run one operator and count what it made."""
        self._settle()
        result = func(*args, **kwargs)
        self._drain()
        self.operators.add(func._name)
        for tensor in _tensors(result):
            for part in _parts(tensor):
                storage = part.untyped_storage()
                known = self._live.get(storage._cdata)
                if known is not None:
                    self._resize(known, storage.nbytes())
                elif func._name == "aten::lift_fresh" or not _aliases(storage, args, kwargs):
                    self._add(part)
        return result

    def _add(self, tensor: Tensor) -> None:
        if tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        death = _Death(storage, self._dead.append)
        death.key = storage._cdata
        self._live[death.key] = _Live(death)
        self._resize(self._live[death.key], storage.nbytes())

    def _resize(self, live: _Live, nbytes: int) -> None:
        """The one place where live bytes change."""
        self._bytes[live.host] += nbytes - live.nbytes
        live.nbytes = nbytes

    def _drain(self) -> None:
        """Subtract freed storages. They are queued, so that a finalizer never races an operator."""
        while self._dead:
            death = self._dead.popleft()
            assert isinstance(death, _Death)
            self._resize(self._live[death.key], 0)
            del self._live[death.key]

    def _settle(self) -> None:
        """Update the peaks with the state after the last operator.

        Runs when the next operator begins, because `mark_host` may be called between the two.
        """
        live, host = self._bytes[False], self._bytes[True]
        self._peaks[self._phase] = max(live, self._peaks.get(self._phase, 0))
        self._host_peak = max(host, self._host_peak)


def _watched(tracker: Tracker, original: Callable[..., Any]) -> Callable[[Any, int], Any]:
    """`UntypedStorage.resize_` with counting, because no dispatch mode sees it."""

    @wraps(original)
    def resize_(storage: torch.UntypedStorage, size: int) -> Any:
        tracker._settle()
        result = original(storage, size)
        tracker._drain()
        live = tracker._live.get(storage._cdata)
        if live is not None:
            tracker._resize(live, storage.nbytes())
        return result

    return resize_


class _Mode(TorchDispatchMode):
    """Passes every operator to a tracker."""

    def __init__(self, tracker: Tracker) -> None:
        TorchDispatchMode.__init__(self)
        self._tracker = weakref.proxy(tracker)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
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
