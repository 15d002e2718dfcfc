"""Head groups: which heads a rank works on, and which of them at the same time. Imports no torch.

Legend: P sequence-parallel degree, H query heads, K kv heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class HeadGroups:
    """H query heads over `degree` ranks, with each rank's heads in `num_groups` groups.

    A group holds whole kv heads with all their queries, or shares its kv heads with other groups.
    """

    num_heads: int
    num_kv_heads: int
    degree: int
    num_groups: int

    @classmethod
    def of(
        cls,
        num_heads: int,
        num_kv_heads: int,
        degree: int,
        num_groups: int | None,
        most: int | None = None,
    ) -> HeadGroups:
        """Create and check. Raises `ValueError` with the legal numbers of groups.

        None takes the largest one, of those that are at most `most`.
        """
        whole = math.lcm(num_kv_heads, degree)
        if num_heads % whole:
            raise ValueError(
                f"num_attention_heads ({num_heads}) must be a multiple of num_key_value_heads "
                f"({num_kv_heads}) repeated for sp ({degree}), which is {whole}; use another sp"
            )
        heads, kv_heads = num_heads // degree, whole // degree
        legal = [
            n
            for n in range(1, heads + 1)
            if heads % n == 0 and (kv_heads % n == 0 or n % kv_heads == 0)
        ]
        largest = max(n for n in legal if most is None or n <= most)
        chosen = largest if num_groups is None else num_groups
        if chosen not in legal:
            raise ValueError(
                f"groups ({chosen}) must split the {heads} query and {kv_heads} kv heads of a rank "
                f"evenly; use groups in {legal}"
            )
        return cls(num_heads, num_kv_heads, degree, chosen)

    @property
    def copies(self) -> int:
        """Number of copies of each kv head, so that every rank has one."""
        return math.lcm(self.num_kv_heads, self.degree) // self.num_kv_heads

    @property
    def heads(self) -> int:
        """Number of query heads of a group on one rank."""
        return self.num_heads // self.degree // self.num_groups

    @property
    def num_kv_groups(self) -> int:
        """Number of groups of kv heads; `num_groups` is a multiple of it."""
        return min(self.num_groups, self._kv_heads_of_rank)

    @property
    def kv_heads(self) -> int:
        """Number of kv heads of a kv group on one rank, copies included."""
        return self._kv_heads_of_rank // self.num_kv_groups

    @property
    def _kv_heads_of_rank(self) -> int:
        return self.num_kv_heads * self.copies // self.degree

    def kv_group(self, group: int) -> int:
        """The kv group that query group `group` attends to."""
        return group * self.num_kv_groups // self.num_groups

    def query_heads(self, group: int) -> list[int]:
        """Query heads of `group` in send order: those of rank 0, of rank 1, ..."""
        of_rank = self.num_heads // self.degree
        return [
            rank * of_rank + group * self.heads + i
            for rank in range(self.degree)
            for i in range(self.heads)
        ]

    def key_heads(self, kv_group: int) -> list[int]:
        """kv heads of `kv_group` in send order; a repeated head appears once for each copy."""
        of_rank = self._kv_heads_of_rank
        return [
            (rank * of_rank + kv_group * self.kv_heads + i) // self.copies
            for rank in range(self.degree)
            for i in range(self.kv_heads)
        ]
