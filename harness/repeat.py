"""A recorded step of a shallow model, stretched to any number of equal layers.

In a model of 5 equal layers the third has only ordinary neighbours, in forward and in backward. So its
events, repeated, are what a deeper model does; who frees what keeps its distance in layers. Where one
layer input is kept of several layers, so many of them are what is called a layer here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from harness.tracker import Allocation, Event

DEPTH = 5
"""Layers of the recorded model."""
MIDDLE = 2
"""The layer that is repeated."""

NEAR = 2
"""Layers over which one frees what another made; what reaches further belongs to the first or last
layer itself."""


@dataclass(frozen=True)
class Recording:
    """Everything that was allocated and freed in a step."""

    allocations: list[Allocation]
    events: list[Event]


@dataclass(frozen=True)
class _Span:
    """Events from a point in one layer to the same point in the next."""

    backward: bool
    layer: int
    """-1 before the first layer."""
    start: int
    stop: int


class _Origin(NamedTuple):
    """Where an allocation was made: the `ordinal`-th of a pass through a layer."""

    backward: bool
    layer: int
    ordinal: int


def passes(count: int, period: int) -> list[int]:
    """Of all `count` passes through the layers of 5 segments, `period` layers each, those that begin a segment.

    Forward runs each layer once. Backward begins with a segment's last layer, which needs an input: the
    others run forward again; then backward goes on to the first.
    """
    assert count == DEPTH * (3 * period - 1), f"{count} passes through {DEPTH} x {period} layers"
    forward = [segment * period for segment in range(DEPTH)]
    return forward + [DEPTH * period + segment * (2 * period - 1) for segment in range(DEPTH)]


def repeated(
    recording: Recording, calls: list[int], residents: set[int], num_layers: int
) -> Recording:
    """The step at `num_layers` (at least 5) layers, from one recorded at 5.

    `calls` holds the number of events before each pass through a layer: forward from the first layer to the
    last, then the recomputation in backward from the last to the first. `residents` are the numbers of the
    allocations that stay for the third layer from before the first pass: its parameters.
    """
    spans = list(_spans(calls, len(recording.events)))
    origins = _origins(recording, spans)
    extra = num_layers - DEPTH

    def deep(layer: int) -> int:
        """Layer of the deep model for one at or after the middle of the shallow one."""
        return layer if layer < MIDDLE else layer + extra

    numbers: dict[_Origin, int] = {}
    allocations: list[Allocation] = []
    events: list[Event] = []
    for span in spans:
        if span.layer == MIDDLE:
            layers = list(range(MIDDLE, MIDDLE + extra + 1))
            copies = layers[::-1] if span.backward else layers
        else:
            copies = [deep(span.layer)]
        for copy in copies:
            for event in recording.events[span.start : span.stop]:
                origin = origins[event.allocation]
                away = origin.layer - span.layer
                near = origin.layer >= 0 and span.layer >= 0 and abs(away) <= NEAR
                layer = copy + away if near else deep(origin.layer)
                key = _Origin(origin.backward, layer, origin.ordinal)
                if key not in numbers:
                    numbers[key] = len(allocations)
                    allocations.append(recording.allocations[event.allocation])
                events.append(Event(numbers[key], event.nbytes, event.host, event.phase))
                if span.layer < 0 and event.allocation in residents:
                    for more in range(extra):
                        copied = key._replace(layer=-2 - more)
                        if copied not in numbers:
                            numbers[copied] = len(allocations)
                            allocations.append(recording.allocations[event.allocation])
                        events.append(event._replace(allocation=numbers[copied]))
    return Recording(allocations, events)


def _spans(calls: list[int], end: int) -> Iterator[_Span]:
    yield _Span(backward=False, layer=-1, start=0, stop=calls[0])
    layers = [*range(DEPTH), *reversed(range(DEPTH))]
    for index, (start, stop) in enumerate(pairwise([*calls, end])):
        yield _Span(backward=index >= DEPTH, layer=layers[index], start=start, stop=stop)


def _origins(recording: Recording, spans: list[_Span]) -> dict[int, _Origin]:
    origins: dict[int, _Origin] = {}
    for span in spans:
        made = 0
        for event in recording.events[span.start : span.stop]:
            if event.allocation not in origins:
                origins[event.allocation] = _Origin(span.backward, span.layer, made)
                made += 1
    return origins
