"""Checkpoint segments: only the first of consecutive layers keeps its input; backward recomputes the others'.

Source: Chen et al., arXiv:1604.06174: of L layers, sqrt(L) inputs are kept, for one more forward pass.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from alst_impl.ops.memory.parked import Resident, Rows

Step = Callable[[Tensor], Tensor]
"""A layer's forward without a graph: its input -> its output."""
Keep = Callable[[Tensor], Rows]
"""Stores a layer's input until backward needs it."""


class Segment:
    """One forward and backward through the layers of a segment.

    Layers join in order and take their inputs in reverse order.
    """

    def __init__(self, first: Rows) -> None:
        self._inputs = [first]
        self._steps: list[tuple[Step, Keep, bool]] = []

    def __len__(self) -> int:
        return len(self._steps)

    def join(self, step: Step, keep: Keep, stays: bool) -> None:
        """Add the next layer; `stays` says that backward needs its whole input on the device."""
        self._steps.append((step, keep, stays))

    def take(self) -> Rows:
        """The input of the last layer that has not taken it. The first call reruns all layers before it: collective."""
        missing = list(range(len(self._inputs), len(self._steps)))
        if missing:
            x = self._inputs[-1].whole()
            for index in missing:
                x = self._steps[index - 1][0](x)
                _, keep, stays = self._steps[index]
                needed_now = stays and index == missing[-1]
                self._inputs.append(Resident(x) if needed_now else keep(x))
        self._steps.pop()
        return self._inputs.pop()


class Segments:
    """The layers of a model in segments of `every` layers; the last one may be shorter."""

    def __init__(self, every: int, num_layers: int) -> None:
        self._every, self._num_layers = every, num_layers
        self._open: Segment | None = None
        self._passed = 0

    def join(self, x: Tensor, step: Step, keep: Keep, *, stays: bool) -> Segment:
        """Add the layer that runs next, on `x`, and return its segment. Layers run in order, any number of times."""
        if self._open is None:
            self._open = Segment(keep(x))
        segment = self._open
        segment.join(step, keep, stays)
        self._passed = (self._passed + 1) % self._num_layers
        if len(segment) == self._every or self._passed == 0:
            self._open = None
        return segment
