"""PyTorch's fused attention; PyTorch chooses the kernel for the device and dtype."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from alst_impl.ops.attention.cores.base import Kernel, sdpa

if TYPE_CHECKING:
    from torch import Tensor


class Sdpa(Kernel):
    """The default: it runs everywhere, and supports windows."""

    cpu: ClassVar[bool] = True
    flash: ClassVar[bool] = True
    windows: ClassVar[bool] = True

    def causal(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        return sdpa(query, key, value, scale)
