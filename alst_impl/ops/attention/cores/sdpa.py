"""PyTorch's fused attention; PyTorch chooses the kernel for the device and dtype."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from alst_impl.ops.attention.cores.base import Kernel, sdpa

if TYPE_CHECKING:
    from torch import Tensor

    from alst_impl.ops.attention.variant import Variant


class Sdpa(Kernel):
    """The default: it runs everywhere, and supports every variant."""

    cpu: ClassVar[bool] = True
    flash: ClassVar[bool] = True
    tiles: ClassVar[bool] = True

    def causal(self, query: Tensor, key: Tensor, value: Tensor, variant: Variant) -> Tensor:
        return sdpa(query, key, value, variant.scale)
