"""What an attention layer computes beside scaled dot products. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from alst_impl.layout import Documents

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Variant:
    """How causal attention turns scores into weights, as the model's attention layer defines it."""

    scale: float
    """Factor on the scores."""
    window: int | None = None
    """Number of keys that a query sees, itself included; None for all."""
    chunk: int | None = None
    """A query sees only keys of its own chunk of so many tokens of the sample (Llama 4); None for one chunk."""
    softcap: float | None = None
    """Scores x become softcap * tanh(x / softcap) (Gemma 2); None leaves them."""
    sinks: Tensor | None = None
    """One more score for each query head, [H], that takes weight and has no value (gpt-oss)."""

    def over(self, seqlen: int) -> Variant:
        """The same attention over sequences of `seqlen` tokens: limits that hide nothing are dropped."""
        window, chunk = (
            None if limit is None or limit >= seqlen else limit
            for limit in (self.window, self.chunk)
        )
        return replace(self, window=window, chunk=chunk)

    def needs(self) -> frozenset[str]:
        """What a kernel has to know beside the causal mask: some of "window", "softcap" and "sinks"."""
        asked = {"window": self.window, "softcap": self.softcap, "sinks": self.sinks}
        return frozenset(name for name, value in asked.items() if value is not None)

    def says(self, parts: Collection[str] | None = None) -> str:
        """The limits of this attention in words, of all `parts` or some, for messages."""
        said = {
            "window": f"a sliding window ({self.window}) shorter than the sequence",
            "softcap": f"soft-capped scores ({self.softcap})",
            "sinks": "attention sinks",
            "chunk": f"chunks of {self.chunk} tokens",
        }
        asked = set(self.needs() if parts is None else parts)
        if parts is None and self.chunk is not None:
            asked.add("chunk")
        return " and ".join(text for part, text in said.items() if part in asked)

    def documents(self, batch: int, seqlen: int, documents: Documents | None) -> Documents | None:
        """Lengths of the parts of each sample that do not see each other: `documents`, cut at the borders of chunks."""
        if self.chunk is None:
            return documents
        return [_cut(lengths, self.chunk) for lengths in documents or [[seqlen]] * batch]


def visible_pairs(length: int, window: int | None = None) -> int:
    """Query-key pairs of one head over a document of `length` tokens, each of which sees the last `window`."""
    near = length if window is None else min(window, length)
    return near * (near + 1) // 2 + (length - near) * near


def _cut(lengths: Sequence[int], chunk: int) -> list[int]:
    parts, start = [], 0
    for length in lengths:
        stop = start + length
        while start < stop:
            border = min((start // chunk + 1) * chunk, stop)
            parts.append(border - start)
            start = border
    return parts
