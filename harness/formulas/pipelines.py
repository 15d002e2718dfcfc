"""Simulated schedules of pipelines over sequence slices, at published sizes. Imports no torch.

The order of units is that of `alst_impl.ops.pipeline.executor`. Time and memory of a unit are
modelled: FLOPs over two rates, and published bytes per token. A stage may be tensor-parallel,
unlike in any method of `alst_impl`; its work and bytes are then divided evenly. Models are GPTs
(model_type gpt_neox).
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from alst_impl.config import Frozen, TrainConfig
from alst_impl.methods.base import layouts, load_method
from alst_impl.methods.seq1f1b import Seq1F1B, layers_of
from alst_impl.models import described, field
from alst_impl.ops.pipeline.schedule import Span, Unit, bubble, makespan, orders, peak_live, play
from harness.cells.hardware import Hardware, load_hardware
from harness.cells.prediction import Flops, Prediction
from harness.formulas import flops

ACTIVATION_BYTES = 34
"""Activation bytes of one layer per token and hidden unit, in bf16. Attention scores are not stored
but recomputed; nothing else is recomputed (arXiv:2205.05198, sections 4.1 and 5). Tensor
parallelism with sequence parallelism divides all of them."""
WEIGHT_BYTES = 6
"""Bytes per parameter of a stage: bf16 weight and fp32 gradient (Megatron-LM)."""
OPTIMIZER_BYTES = 12
"""Bytes per parameter: fp32 master weight and two moments, sharded over data-parallel ranks
(Megatron-LM's distributed optimizer)."""
ATTENTION_BACKWARD = 2.5
"""Backward time over forward time of attention: FlashAttention has five matrix products in backward
and two in forward."""
LINEAR_BACKWARD = 2.0
"""Backward time over forward time of matrix products, without recomputation."""
LINEAR_SHARE = 0.4520963
"""Share of the peak that matrix products reach: fitted, Megatron-LM on A100."""
ATTENTION_SHARE = 0.5256934
"""Share of the peak that causal attention reaches, masked scores not counted: fitted together with `LINEAR_SHARE`."""
FITTED_ON = "seq1f1b-7b-32k-8-1f1b"
"""The claim whose throughput both shares were fitted on. It is not evidence."""


class Staged(Frozen):
    """Inputs of a pipeline's schedule."""

    shape: flops.Shape
    vocab_size: int
    borders: list[int]
    """Borders of slices: 0, ..., S."""
    micro_batches: int
    pp: int
    tp: int
    dp: int
    hardware: Hardware

    @property
    def parts(self) -> int:
        """Number of slices of a sequence."""
        return len(self.borders) - 1

    def layers(self, stage: int) -> int:
        """Number of layers of a stage."""
        return len(layers_of(stage, self.pp, self.shape.num_layers))

    @property
    def layer_parameters(self) -> int:
        """Parameters of one layer."""
        ends = 2 * self.shape.num_lookup_parameters
        return (self.shape.num_parameters - ends) // self.shape.num_layers


def parameters_of(fields: dict[str, Any]) -> int:
    """Parameters of a GPT: matrices, biases and norms of layers; final norm; embedding and head.

    Raises `ValueError` for another kind of model.
    """
    if fields["model_type"] != "gpt_neox" or fields["tie_word_embeddings"]:
        raise ValueError(
            f"world 'schedule' supports model_type gpt_neox with untied embeddings only, not {fields['model_type']}; "
            "use world 'phantom'"
        )
    hidden, inner = field(fields, "hidden_size"), field(fields, "intermediate_size")
    layer = 4 * hidden**2 + 4 * hidden + 2 * hidden * inner + inner + hidden + 4 * hidden
    ends = 2 * field(fields, "vocab_size") * hidden + 2 * hidden
    return field(fields, "num_hidden_layers") * layer + ends


def staged(train: TrainConfig, tp: int, hardware: str) -> Staged:
    """The pipeline of a run of method seq1f1b with `tp` ranks per stage."""
    method = load_method(train.method)
    if not isinstance(method, Seq1F1B):
        raise ValueError(
            f"world 'schedule' plays pipelines, but method '{train.method.name}' is not one; use 'seq1f1b'"
        )
    if train.world_size % (method.pp * tp):
        raise ValueError(
            f"pp x tp ({method.pp} x {tp}) must divide world_size ({train.world_size}); use a multiple"
        )
    fields = described(train.model, train.overrides)
    shape = flops.shape_of(fields, parameters_of(fields))
    per_token = 2 * (shape.num_parameters - 2 * shape.num_lookup_parameters) / shape.num_layers
    return Staged(
        shape=shape,
        vocab_size=field(fields, "vocab_size"),
        borders=method.borders(per_token, fields, train.seqlen),
        micro_batches=train.accumulation,
        pp=method.pp,
        tp=tp,
        dp=train.world_size // (method.pp * tp),
        hardware=load_hardware(hardware),
    )


def played(s: Staged) -> list[list[Span]]:
    """The units of every stage with their start and end times."""
    forward = [
        [_seconds(s, stage, start, stop) for start, stop in pairwise(s.borders)]
        for stage in range(s.pp)
    ]

    def seconds(stage: int, unit: Unit) -> float:
        linear, attention = forward[stage][unit.part]
        if unit.backward:
            return LINEAR_BACKWARD * linear + ATTENTION_BACKWARD * attention
        return linear + attention

    return play(orders(s.pp, s.micro_batches, s.parts), seconds)


def waiting(train: TrainConfig) -> float:
    """Bubble fraction of a step with equal slices and stages; 0 without a pipeline."""
    pp = layouts(train)[0].pp
    parts = getattr(load_method(train.method), "slices", 1)
    return bubble(play(orders(pp, train.accumulation, parts), lambda _, unit: 1.0 + unit.backward))


def _seconds(s: Staged, stage: int, start: int, stop: int) -> tuple[float, float]:
    """Forward time of tokens `start` to `stop` through a stage: (matrix products, attention)."""
    shape, layers = s.shape, s.layers(stage)
    linear = 2 * s.layer_parameters * layers * (stop - start)
    if stage == s.pp - 1:
        linear += 2 * s.vocab_size * shape.hidden_size * (stop - start)
    pairs = (stop * (stop + 1) - start * (start + 1)) // 2
    attention = 4 * layers * shape.num_heads * shape.head_dim * pairs
    peak = s.tp * _peak(s.hardware)
    return linear / (LINEAR_SHARE * peak), attention / (ATTENTION_SHARE * peak)


def _peak(hardware: Hardware) -> float:
    if hardware.bf16_flops is None:
        raise ValueError(
            f"hardware '{hardware.name}' has no bf16_flops, which world 'schedule' needs"
        )
    return hardware.bf16_flops


def held(s: Staged) -> dict[str, int]:
    """Bytes of the rank with the highest memory use, by category. Logits of the last stage are left out."""
    lengths = [float(stop - start) for start, stop in pairwise(s.borders)]
    per_token = ACTIVATION_BYTES * s.shape.hidden_size / s.tp
    activations = max(
        peak_live(order, lengths) * s.layers(stage) * per_token
        for stage, order in enumerate(orders(s.pp, s.micro_batches, s.parts))
    )
    parameters = s.shape.num_parameters / (s.pp * s.tp)
    return {
        "activations": int(activations),
        "parameters and gradients": int(WEIGHT_BYTES * parameters),
        "optimizer": int(OPTIMIZER_BYTES * parameters / s.dp),
    }


def prediction(s: Staged) -> Prediction:
    """Bytes and time of one step."""
    by_category = held(s)
    total = sum(by_category.values())
    seqlen, sequences = s.borders[-1], s.micro_batches * s.dp
    fits = total <= s.hardware.usable_bytes
    return Prediction(
        allocated_bytes=total,
        overhead_bytes=0,
        total_bytes=total,
        host_bytes=0,
        bytes_per_local_token=None,
        by_category=by_category,
        fits=fits,
        limit="none" if fits else "gpu_memory",
        flops=Flops(
            paper_formula=sequences * flops.paper_formula(s.shape, seqlen),
            model_causal=sequences * flops.model_causal(s.shape, [seqlen]),
        ),
        step_seconds_modelled=makespan(played(s)),
    )
