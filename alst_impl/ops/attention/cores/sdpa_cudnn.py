"""cuDNN's attention through PyTorch; inputs that it does not support are an error."""

from __future__ import annotations

from typing import TYPE_CHECKING

from alst_impl.ops.attention.cores.base import Kernel, sdpa

if TYPE_CHECKING:
    from torch import Tensor

    from alst_impl.ops.attention.variant import Variant


class SdpaCudnn(Kernel):
    """Documents take one call each."""

    def causal(self, query: Tensor, key: Tensor, value: Tensor, variant: Variant) -> Tensor:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return sdpa(query, key, value, variant.scale)
