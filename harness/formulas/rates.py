"""Speeds that published training steps reached, by architecture and attention kernel. Imports no torch.

A rate is a share of the datasheet's peak bf16 FLOP/s, over forward and backward. A fitted rate is solved from
published steps, which are no evidence then: they are marked in `experiments/step_times.yaml`. Every other rate
is derived from a fitted one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from alst_impl.config import Frozen
from harness.cells.hardware import Hardware


class Rate(Frozen):
    """The share of the peak that a kind of work reaches."""

    share: float
    """Of the peak bf16 FLOP/s. Masked scores are not counted as work of attention."""
    source: str
    """The published steps that it was solved from, or how it was derived."""
    fitted: bool = False
    """Whether it was solved from a step on this architecture."""


class Architecture(NamedTuple):
    """Rates of devices of one compute capability."""

    products: Rate
    """Matrix products."""
    attention: Mapping[str, Rate]
    """By core attention, as in `alst_impl/ops/attention/cores/`; under `sdpa` PyTorch chooses its flash kernel."""


UPIPE = "Llama3-8B, Ulysses, 8 x H100, {} tokens (arXiv:2602.21196, Table 3)"
TRL = "Qwen3-8B, ring, 8 x H100, 1,048,576 tokens, {} (huggingface/transformers#48324)"
HOPPER_FLASH = Rate(share=0.320, source=TRL.format("PyTorch's flash kernel"), fitted=True)
HOPPER = Architecture(
    products=Rate(share=0.582, source=UPIPE.format("131,072"), fitted=True),
    attention={
        "sdpa": HOPPER_FLASH,
        "sdpa_flash": HOPPER_FLASH,
        "sdpa_cudnn": Rate(share=0.538, source=TRL.format("cuDNN"), fitted=True),
        "flash_attention_2": Rate(
            share=0.3375,
            source="Llama-8B, 8 x H100, 3.8M tokens (arXiv:2506.13996, Table 3)",
            fitted=True,
        ),
        "flash_attention_3": Rate(share=0.650, source=UPIPE.format("1,048,576"), fitted=True),
        "flex": Rate(
            share=0.29,
            source="87 % of FlashAttention-2's rate (PyTorch's article on FlexAttention: 90 and 85 %)",
        ),
    },
)
AMPERE_FLASH = Rate(
    share=0.538,
    source="Llama-7B, Ulysses, 16 x A100, 524,288 tokens (arXiv:2310.03294, Table 4)",
    fitted=True,
)
AMPERE = Architecture(
    products=Rate(
        share=0.837,
        source="Llama2-7B unsplit and Llama3-8B in mini-sequences, A100, equal errors (arXiv:2407.15892, section 4.2)",
        fitted=True,
    ),
    attention={
        "sdpa": AMPERE_FLASH,
        "sdpa_flash": AMPERE_FLASH,
        "flash_attention_2": AMPERE_FLASH,
        "flex": Rate(
            share=0.46,
            source="87 % of FlashAttention-2's rate (PyTorch's article on FlexAttention: 90 and 85 %)",
        ),
    },
)
LIKE_AMPERE = Architecture(
    products=Rate(share=AMPERE.products.share, source="an A100's share of the peak"),
    attention={
        name: Rate(share=rate.share, source="an A100's share of the peak: the same kernels")
        for name, rate in AMPERE.attention.items()
    },
)
LIKE_HOPPER = Architecture(
    products=Rate(share=HOPPER.products.share, source="an H100's share of the peak"),
    attention={
        # These two kernels know nothing of Blackwell and run as on an H100: 320 TFLOP/s of 2,250.
        "sdpa": Rate(share=0.142, source="an H100's FLOP/s: the same kernel"),
        "flash_attention_2": Rate(share=0.148, source="an H100's FLOP/s: the same kernel"),
        "sdpa_cudnn": Rate(share=0.538, source="an H100's share of the peak"),
        "flash_attention_4": Rate(share=0.650, source="FlashAttention-3's share of an H100's peak"),
    },
)
ARCHITECTURES = {
    (8, 0): AMPERE,
    (8, 6): LIKE_AMPERE,
    (8, 9): LIKE_AMPERE,
    (9, 0): HOPPER,
    (10, 0): LIKE_HOPPER,
    (10, 3): LIKE_HOPPER,
    (12, 0): LIKE_AMPERE,
}
"""Compute capability -> its rates."""


def architecture(hardware: Hardware) -> Architecture | None:
    """Rates of `hardware`; None if none are known."""
    return None if hardware.chip is None else ARCHITECTURES.get(hardware.chip.capability)
