"""Ulysses within a ring's places: past the number of heads, with shorter rings (arXiv:2405.07719)."""

from __future__ import annotations

from pydantic import Field

from alst_impl.config import TrainConfig
from alst_impl.methods.ring import Ring


class Usp(Ring):
    """`sp` ranks with close links trade tokens for heads; `cp` such groups make a ring."""

    sp: int = Field(default=1, ge=1)
    """Ranks that share a place in the ring, each with its part of the heads."""

    def shards_of_place(self) -> int:
        return self.sp

    def promises(self, config: TrainConfig) -> set[str]:
        return super().promises(config) | ({"exchanges"} if self.sp > 1 else set())
