"""The interface of a core attention, and causal kernels behind it. Imports torch inside functions.

Legend: B batch, S sequence, H query heads, K kv heads (K divides H), D head dim, T tokens of all samples.
"""

from __future__ import annotations

import importlib
import importlib.util
from abc import abstractmethod
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

from pydantic import BeforeValidator, model_validator

from alst_impl.config import Frozen, Spec
from alst_impl.layout import Documents, Layout
from alst_impl.ops.attention.patterns.base import Pattern, as_pattern, pairs_of
from alst_impl.ops.attention.variant import Variant, visible_pairs
from alst_impl.plugin import load

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    Attend = Callable[[Tensor, Tensor, Tensor, Variant], Tensor]


class Core(Frozen):
    """Attention of whole sequences of some heads: which keys a query sees, and how that is computed."""

    cpu: ClassVar[bool] = False
    """Whether it runs on a CPU."""
    replaceable: ClassVar[bool] = False
    """Whether PyTorch's flash kernel may be called in its place where there is no pattern."""
    in_pytorch: ClassVar[str | None] = None
    """Name under which PyTorch's flash operators run this kernel (`torch.nn.attention.activate_flash_attention_impl`)."""
    compiled: ClassVar[bool] = False
    """Whether PyTorch compiles its kernel, so that what watches PyTorch's operators does not see it."""

    patterned: ClassVar[bool] = False
    """Whether it computes patterns."""
    pattern: Annotated[Pattern | None, BeforeValidator(as_pattern)] = None
    """Which of the keys before it a query sees; None for all that the model's layer lets it see."""

    @model_validator(mode="after")
    def only_some_cores_take_a_pattern(self) -> Self:
        if self.pattern is not None and not self.patterned:
            raise ValueError(
                f"its kernel does not compute pattern {self.pattern.text}; use attention 'sdpa' or 'flex'"
            )
        return self

    @property
    def flash(self) -> bool:
        """Whether PyTorch's flash kernel may be called in its place, as methods do that need its log-sum-exp."""
        return self.replaceable and self.pattern is None

    @property
    def by_operator(self) -> bool:
        """Whether PyTorch's flash operators can run it, as methods do that need its log-sum-exp."""
        return self.replaceable or self.in_pytorch is not None

    def activate(self) -> None:
        """Have PyTorch's flash operators run this kernel, in the whole process. Raises `ValueError` if they cannot."""
        from torch.nn import attention

        missing = self.missing()
        if missing:
            raise ValueError(missing)
        if (
            self.in_pytorch is not None
            and attention.current_flash_attention_impl() != self.in_pytorch
        ):
            attention.activate_flash_attention_impl(self.in_pytorch)

    def missing(self) -> str | None:
        """Error message if a package that the core needs is not installed; None if nothing is missing."""
        return None

    @abstractmethod
    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, *, layout: Layout, variant: Variant
    ) -> Tensor:
        """query [B, H, S, D], key and value [B, K, S, D] -> [B, H, S, D] in their dtype, for S tokens of `layout`.

        Raises `ValueError` if the core is not installed or does not support the variant. Never makes an S x S
        mask.
        """

    def limits(self, layout: Layout, variant: Variant) -> tuple[Pattern, Variant]:
        """The pattern, and the `variant` beside it. Raises `ValueError` if the model's layer limits keys, too."""
        assert self.pattern is not None, "asked where there is one"
        variant = variant.over(layout.length)
        limits = replace(variant, softcap=None, sinks=None).says()
        if limits:
            raise ValueError(
                f"attention pattern {self.pattern.text} does not join other limits, but the model's layer has {limits}; "
                "use a model without, remove them by overrides, or leave the pattern out"
            )
        return self.pattern, variant

    def narrowed(self, layout: Layout, variant: Variant) -> tuple[Variant, int]:
        """`variant` with the window of the pattern, for methods that compute windows themselves, and its global tokens."""
        if self.pattern is None:
            return variant, 0
        pattern, variant = self.limits(layout, variant)
        keys = pattern.as_window()
        assert keys is not None, "methods are asked first whether they compute a pattern"
        return replace(variant, window=keys[0]), keys[1]

    def visible_pairs(self, layout: Layout, window: int | None = None) -> int:
        """(query, key) pairs of one head over the documents of `layout`; without documents, of one sample.

        Padding is included. By default causal within each document, of which a query sees the last `window`
        keys; with a pattern, which no window joins, exactly those of the pattern.
        """
        samples = layout.documents or ((layout.padded,),)
        pattern = self.pattern
        if pattern is not None:
            return sum(pairs_of(pattern, length) for lengths in samples for length in lengths)
        return sum(visible_pairs(length, window) for lengths in samples for length in lengths)


class Kernel(Core):
    """A fused causal kernel. Documents take one call each, but for a `PackingKernel`."""

    native: ClassVar[frozenset[str]] = frozenset()
    """Parts of a variant that the kernel computes itself, as `Variant.needs` names them."""
    tiles: ClassVar[bool] = False
    """Whether what the kernel does not compute itself is computed block by block through PyTorch."""

    @abstractmethod
    def causal(self, query: Tensor, key: Tensor, value: Tensor, variant: Variant) -> Tensor:
        """query [B, H, S, D], key and value [B, K, S, D] -> [B, H, S, D], causal, with the `native` parts of `variant`."""

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, *, layout: Layout, variant: Variant
    ) -> Tensor:
        batch, _, seqlen, _ = query.shape
        variant = variant.over(seqlen)
        documents = variant.documents(batch, seqlen, layout.documents)
        missing = variant.needs() - self.native
        if missing and not self.tiles:
            name = type(self).__module__.rsplit(".", 1)[-1]
            raise ValueError(
                f"attention '{name}' does not support {variant.says(missing)} ({seqlen} tokens); use attention 'sdpa'"
            )
        if documents is None:
            return self._document(query, key, value, variant)
        if not missing and isinstance(self, PackingKernel):
            return self.in_one_call(query, key, value, variant, documents)
        return each_document(self._document, query, key, value, variant, documents)

    def _document(self, query: Tensor, key: Tensor, value: Tensor, variant: Variant) -> Tensor:
        """Attention within one document."""
        variant = variant.over(query.shape[2])
        missing = variant.needs() - self.native
        if not missing:
            return self.causal(query, key, value, variant)
        if missing == {"window"}:
            return _windowed(query, key, value, variant)
        from alst_impl.ops.attention import flash, fused, tiles

        if missing == {"sinks"} and flash.supports(query, value):
            return fused.attend(query, key, value, variant)
        return tiles.attend(query, key, value, variant)


def each_document(
    attend: Attend,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    variant: Variant,
    documents: Documents,
) -> Tensor:
    """`attend` of one document after the other, for samples [B, H, S, D] of `documents`."""
    samples = []
    for index, lengths in enumerate(documents):
        sample = [x[index : index + 1].split(list(lengths), dim=2) for x in (query, key, value)]
        parts = [attend(q, k, v, variant) for q, k, v in zip(*sample, strict=True)]
        samples.append(_joined(parts, dim=2))
    return _joined(samples, dim=0)


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    """`parts` along `dim`; a single one as it is, because `torch.cat` would copy it beside what its backward keeps."""
    import torch

    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)


def _windowed(query: Tensor, key: Tensor, value: Tensor, variant: Variant) -> Tensor:
    """Attention with a window through PyTorch's kernels, block by block of queries: O(S * window) memory."""
    import torch

    seqlen, window = query.shape[2], variant.window
    assert window is not None, "without a window one call is enough"
    blocks = []
    for start in range(0, seqlen, window):
        stop = min(start + window, seqlen)
        first = max(start - window + 1, 0)
        distance = (
            torch.arange(start, stop, device=query.device)[:, None]
            - torch.arange(first, stop, device=query.device)[None, :]
        )
        blocks.append(
            torch.nn.functional.scaled_dot_product_attention(
                query[:, :, start:stop],
                key[:, :, first:stop],
                value[:, :, first:stop],
                attn_mask=(distance >= 0) & (distance < window),
                scale=variant.scale,
                enable_gqa=query.shape[1] != key.shape[1],
            )
        )
    return torch.cat(blocks, dim=2)


class PackingKernel(Kernel):
    """A kernel that takes all documents of all samples in one call."""

    @abstractmethod
    def packed(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        offsets: Tensor,
        longest: int,
        variant: Variant,
    ) -> Tensor:
        """query [T, H, D], key and value [T, K, D] -> [T, H, D], causal within each document, as `causal`.

        `offsets` (int32 [N + 1]) are the starts of N documents and the end of the last; `longest` is the
        number of tokens of the longest one.
        """

    def in_one_call(
        self, query: Tensor, key: Tensor, value: Tensor, variant: Variant, documents: Documents
    ) -> Tensor:
        """All documents of all samples in one call."""
        import torch

        batch, _, seqlen, _ = query.shape
        lengths = [length for sample in documents for length in sample]
        offsets = torch.tensor([0, *lengths], device=query.device).cumsum(0).to(torch.int32)
        # [B, H, S, D] -> [B * S, H, D]
        flat = [x.transpose(1, 2).flatten(0, 1) for x in (query, key, value)]
        out = self.packed(flat[0], flat[1], flat[2], offsets, max(lengths), variant)
        # [B * S, H, D] -> [B, H, S, D]
        whole: Tensor = out.unflatten(0, (batch, seqlen))
        return whole.transpose(1, 2)


def sdpa(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """PyTorch's causal attention, in the layout of `Kernel.causal`. The flash kernel's backward takes long calls in parts."""
    import torch

    from alst_impl.ops.attention import fused

    if fused.in_parts(query, key, value, scale):
        return fused.attend(query, key, value, Variant(scale))
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )


class FlashAttention(PackingKernel):
    """The functions of a flash-attn package."""

    module: ClassVar[str]
    """The module that provides the functions."""
    source: ClassVar[str]
    """The package or build that contains the module."""

    def missing(self) -> str | None:
        if importlib.util.find_spec(self.module.partition(".")[0]) is not None:
            return None
        return self._needs()

    def _needs(self) -> str:
        name = type(self).__module__.rsplit(".", 1)[-1]
        return (
            f"attention '{name}' needs {self.source}, which is not installed; or use 'sdpa_flash'"
        )

    def _functions(self) -> Any:
        """Import `module`. Raises `ValueError` if it is missing: there is no fallback."""
        try:
            return importlib.import_module(self.module)
        except ImportError as error:
            raise ValueError(f"{self._needs()} ({' '.join(str(error).split())})") from None

    native: ClassVar[frozenset[str]] = frozenset({"window", "softcap"})

    def causal(self, query: Tensor, key: Tensor, value: Tensor, variant: Variant) -> Tensor:
        # [B, H, S, D] -> [B, S, H, D]: views; the kernel takes any strides as long as D is contiguous
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        attention = self._functions().flash_attn_func
        return output(attention(query, key, value, **self._options(variant))).transpose(1, 2)

    def _options(self, variant: Variant) -> dict[str, Any]:
        """Keyword arguments of the package's functions."""
        options: dict[str, Any] = {"softmax_scale": variant.scale, "causal": True}
        if variant.window is not None:
            options["window_size"] = (variant.window - 1, 0)  # keys before and after a query
        if variant.softcap is not None:
            options["softcap"] = variant.softcap
        return options

    def packed(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        offsets: Tensor,
        longest: int,
        variant: Variant,
    ) -> Tensor:
        attention = self._functions().flash_attn_varlen_func
        result = attention(
            query,
            key,
            value,
            cu_seqlens_q=offsets,
            cu_seqlens_k=offsets,
            max_seqlen_q=longest,
            max_seqlen_k=longest,
            **self._options(variant),
        )
        return output(result)


def output(result: Any) -> Tensor:
    """The attention output; some versions return it together with its statistics."""
    out: Tensor = result[0] if isinstance(result, tuple) else result
    return out


def load_core(spec: Spec | str) -> Core:
    """The core attention of a name, with options. Raises `ValueError` for an unknown one, naming the known ones."""
    spec = Spec.model_validate(spec) if isinstance(spec, str) else spec
    # `load` returns a concrete class; mypy cannot see that.
    return load("alst_impl.ops.attention.cores", Core, spec, kind="attention")
