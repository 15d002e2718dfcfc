"""The one patch: FlexAttention is compiled without timing candidates of its kernels, which phantom devices cannot do."""

import torch
from torch.nn.attention.flex_attention import flex_attention
from torchtitan.models.common.attention import FlexAttention


def compile_untimed() -> None:
    """Let the compiler choose sizes of tiles by its table. They do not change what is allocated outside the kernel."""
    FlexAttention._compiled_flex_attn = torch.compile(
        flex_attention,
        options={
            **FlexAttention.inductor_configs,
            "max_autotune": False,
            "coordinate_descent_tuning": False,
        },
    )
