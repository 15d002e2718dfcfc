"""USP: Ulysses inside a ring, for more ranks than heads and with shorter rings (arXiv:2405.07719)."""

from __future__ import annotations

from pydantic import Field

from alst_impl.config import TrainConfig
from alst_impl.methods.ring import Ring


class Usp(Ring):
    """`sp` ranks with close links use Ulysses; `cp` such groups form a ring."""

    sp: int = Field(default=1, ge=1)
    """Ulysses degree: ranks that share a position in the ring and split its heads."""

    def shards_of_place(self) -> int:
        return self.sp

    def promises(self, config: TrainConfig) -> set[str]:
        return super().promises(config) | ({"exchanges/gathers"} if self.sp > 1 else set())
