"""PyTorch's fused attention; PyTorch chooses the kernel for the device and dtype."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, ClassVar

from alst_impl.ops.attention.cores.base import Kernel, each_document, sdpa

if TYPE_CHECKING:
    from torch import Tensor

    from alst_impl.layout import Layout
    from alst_impl.ops.attention.variant import Variant


class Sdpa(Kernel):
    """The default: it runs everywhere, and supports every variant."""

    cpu: ClassVar[bool] = True
    patterned: ClassVar[bool] = True
    replaceable: ClassVar[bool] = True
    tiles: ClassVar[bool] = True

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, *, layout: Layout, variant: Variant
    ) -> Tensor:
        if self.pattern is None:
            return super().__call__(query, key, value, layout=layout, variant=variant)
        from alst_impl.ops.attention import sparse

        pattern, variant = self.limits(layout, variant)
        attend = partial(sparse.attend, pattern=pattern)
        if layout.documents is None:
            return attend(query, key, value, variant)
        return each_document(attend, query, key, value, variant, layout.documents)

    def causal(self, query: Tensor, key: Tensor, value: Tensor, variant: Variant) -> Tensor:
        return sdpa(query, key, value, variant.scale)
