"""PyTorch's flash kernel; inputs that it does not support are an error."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from alst_impl.ops.attention.cores.base import PackingKernel, output, sdpa

if TYPE_CHECKING:
    from torch import Tensor

    from alst_impl.ops.attention.variant import Variant


class SdpaFlash(PackingKernel):
    """The kernel that the project's records are made with."""

    replaceable: ClassVar[bool] = True

    def causal(self, query: Tensor, key: Tensor, value: Tensor, variant: Variant) -> Tensor:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return sdpa(query, key, value, variant.scale)

    def packed(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        offsets: Tensor,
        longest: int,
        variant: Variant,
    ) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        grouped: dict[str, Any] = {"enable_gqa": True} if query.shape[1] != key.shape[1] else {}
        causal = (-1, 0)  # every key before a query, none after it
        result = varlen_attn(
            query,
            key,
            value,
            offsets,
            offsets,
            longest,
            longest,
            scale=variant.scale,
            window_size=causal,
            **grouped,
        )
        return output(result)
