"""The interface of a pattern: which of the keys before it a query sees, in arithmetic. Imports no torch.

Places are those of tokens in their document, so that a document is computed alike, packed or alone. What a query sees
depends on its own place only, never on the document's length: padding after a sample changes nothing in it.
Legend: n tokens of a document.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from alst_impl.config import Frozen, Spec
from alst_impl.plugin import load

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, device

    Sees = Callable[[Tensor, Tensor], Tensor]
    """Places of queries and of keys (int, broadcast) -> whether the query sees the key, which is not after it."""

Run = tuple[int, int]
"""The first key of a run, and the one after its last."""


class Pattern(Frozen):
    """A causal pattern, the same for all heads and layers. Every query sees its own key."""

    def check(self, seqlen: int) -> None:
        """Raise `ValueError` if the pattern makes no sense for samples of `seqlen` tokens."""

    @abstractmethod
    def sees(self, length: int, device: device) -> Sees:
        """The exact mask of documents up to `length` tokens, on `device`. Never an S x S tensor."""

    @abstractmethod
    def runs(self, first: int, stop: int) -> list[Run]:
        """Keys that any of the queries from `first` to before `stop` sees, and few others: ascending runs that do
        not touch, none of them beyond `stop`.
        """

    @abstractmethod
    def whole_runs(self, first: int, stop: int) -> list[Run]:
        """Keys that every query from `first` to before `stop` sees, or at least most of them: ascending runs."""

    @abstractmethod
    def pairs(self, length: int) -> int:
        """(query, key) pairs that a document of `length` tokens has."""

    def strided(self) -> tuple[int, Pattern]:
        """The distance of tokens that alone see each other, and the pattern among them."""
        return 1, self

    def as_window(self) -> tuple[int, int] | None:
        """The number of last keys that a query sees, and of first ones, if that is all of the pattern; else None."""
        return None

    @property
    def text(self) -> str:
        """Name and options that are no defaults, as in `window (window=8)`."""
        options = ", ".join(f"{k}={v}" for k, v in self.model_dump(exclude_defaults=True).items())
        return f"{self.name} ({options})" if options else self.name

    @property
    def name(self) -> str:
        """Name of its file."""
        return type(self).__module__.rsplit(".", 1)[-1]


def merged(runs: Iterable[Run]) -> list[Run]:
    """`runs` in order, those that touch or overlap as one, without empty ones."""
    found: list[Run] = []
    for start, stop in sorted(run for run in runs if run[0] < run[1]):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(stop, found[-1][1])
        else:
            found.append((start, stop))
    return found


@lru_cache(maxsize=2**10)
def pairs_of(pattern: Pattern, length: int) -> int:
    """As `Pattern.pairs`; packed documents of the same length are counted once."""
    return pattern.pairs(length)


def as_pattern(value: Any) -> Any:
    """The pattern of a name with its options. Raises `ValueError` for an unknown one, naming the known ones."""
    if value is None or isinstance(value, Pattern):
        return value
    # `load` returns a concrete class; mypy cannot see that.
    return load("alst_impl.ops.attention.patterns", Pattern, Spec.model_validate(value))
