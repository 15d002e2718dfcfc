"""The verdict on a gradient comparison: what is close enough, and what a wrong ratio tells.

Imports no torch; `harness.gate.gradients` computes what is judged here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

from alst_impl.config import DType, Frozen, Precision, TrainConfig
from alst_impl.methods.base import load_method
from harness.records.record import Gate, Measurement, ParameterGate, RankEvidence


class Tolerance(Frozen):
    """How far a correct computation in some dtype may be from the truth in fp64."""

    ratio: float
    """Largest |ratio - 1|."""
    cosine: float
    """Largest 1 - cosine."""


TOLERANCES: dict[Precision, Tolerance] = {
    # Transformers itself computes norms and rotary positions in fp32 whatever the model's dtype.
    "float64": Tolerance(ratio=1e-6, cosine=1e-9),
    "float32": Tolerance(ratio=1e-5, cosine=1e-6),
    # 8 bits of mantissa, accumulated over layers; a wrong factor or a lost tile is far outside.
    "bfloat16": Tolerance(ratio=5e-2, cosine=1e-2),
    # 4 bits of mantissa in what backward computes with; forward and loss are as exact as their dtype.
    # Four layers are off by 5e-2 of a gradient's norm at most, which is 1e-3 in cosine.
    "float8_e4m3fn": Tolerance(ratio=5e-2, cosine=5e-3),
}

UPDATE_TOLERANCES: dict[Precision, Tolerance] = {
    **TOLERANCES,
    # PyTorch's fp32 norm of half a million elements is off by 3.5e-5 on a CPU, and clipping divides by it.
    "float32": Tolerance(ratio=1e-4, cosine=1e-6),
}
"""The same for the change of a parameter in one update."""

ROUNDED: set[DType] = {"bfloat16"}
"""Dtypes of which the stock model's own loss of accuracy is computed beside the truth."""

ROUNDING_ROOM = 2.0
"""Where the stock model itself exceeds the tolerance of a rounded dtype, ours may exceed it this many
times as far: tiles and shards round in other places, not worse."""

EPSILON: dict[Precision, float] = {
    "float64": 2.0**-52,
    "float32": 2.0**-23,
    "bfloat16": 2.0**-7,
    "float8_e4m3fn": 2.0**-3,
}
"""Distance from 1 to the next larger number."""


def precision(train: TrainConfig) -> Precision:
    """The coarsest format that gradients of `train` depend on: the key of what is tolerated."""
    return load_method(train.method).precision(train)


def scales(parameters: Iterable[ParameterGate]) -> dict[str, float]:
    """Norm of the largest true gradient in the decoder layer of each parameter; of the model outside layers.

    Rounding errors of a gradient are of the size of what is subtracted to form it, and its neighbours show
    that size where the difference itself is zero.
    """
    norms = {p.parameter: p.truth_norm or 0.0 for p in parameters}
    largest: dict[str, float] = {}
    for name, norm in norms.items():
        largest[_layer(name)] = max(norm, largest.get(_layer(name), 0.0))
    whole = max(norms.values(), default=0.0)
    return {name: largest[_layer(name)] if _layer(name) else whole for name in norms}


def without_noise(parameters: list[ParameterGate], rounding: Precision) -> list[ParameterGate]:
    """`parameters` without ratio and cosine where the truth is noise: both would say nothing of ours."""
    scale = scales(parameters)
    blank = {"ratio": None, "cosine": None}
    return [
        p.model_copy(update=blank) if is_noise(p, scale[p.parameter], rounding) else p
        for p in parameters
    ]


def _layer(name: str) -> str:
    """The beginning of a parameter's name that its whole decoder layer shares; "" outside layers."""
    found = re.match(r".*?\.\d+\.", name)
    return found.group() if found else ""


def noise_floor(parameter: ParameterGate, scale: float, rounding: Precision) -> float:
    """Norm of an error that is rounding in a run in `rounding`, in a layer whose largest gradient has norm `scale`.

    0 for real gradients where `rounding` is coarser than fp32: its epsilon could hide them, and what the
    stock model loses in that dtype is known of each.
    """
    if EPSILON[rounding] > EPSILON["float32"] and not is_noise(parameter, scale, rounding):
        return 0.0
    return EPSILON[rounding] * scale


def is_noise(parameter: ParameterGate, scale: float, rounding: Precision) -> bool:
    """Whether the true gradient is zero, or so near to it that a run in `rounding`, or in fp32, shows rounding alone."""
    epsilon = min(EPSILON[rounding], EPSILON["float32"])
    return parameter.truth_norm is not None and parameter.truth_norm <= epsilon * scale


def used(
    parameter: ParameterGate, tolerance: Tolerance, limit: float = 1.0, floor: float = 0.0
) -> float:
    """Part of what is allowed that an error uses up; above 1 fails.

    `limit` is how many times `tolerance` may be used up. An error of a norm below `floor` is none, however
    large it is beside the truth.
    """
    if parameter.error_norm is None:
        return math.inf
    if parameter.error_norm == 0:
        return 0.0
    absolute = parameter.error_norm / floor if floor else math.inf
    if parameter.ratio is None:
        return absolute
    return min(absolute, excess(parameter, tolerance) / limit)


def relative_error(parameter: ParameterGate) -> float:
    """Norm of the difference to the truth over the truth's, from ratio and cosine; 0 for a zero gradient."""
    if parameter.ratio is None or parameter.cosine is None:
        return 0.0
    squared = 1 + parameter.ratio**2 - 2 * parameter.ratio * parameter.cosine
    return math.sqrt(max(squared, 0.0))


def exactness(gate: Gate, train: TrainConfig) -> str | None:
    """Where an option gives up exactness: through what, and the largest error; None of an exact method."""
    if precision(train) == train.dtype:
        return None
    worst = max(gate.parameters, key=relative_error)
    return (
        f"not exact: backward computes with {precision(train)}; largest relative error "
        f"{relative_error(worst):.1e}, of {worst.parameter}"
    )


def excess(parameter: ParameterGate, tolerance: Tolerance) -> float:
    """How many times the worse of both bounds is used up; above 1 fails. Zero for a zero gradient."""
    if parameter.ratio is None or parameter.cosine is None:
        return 0.0
    return max(
        abs(parameter.ratio - 1) / tolerance.ratio, (1 - parameter.cosine) / tolerance.cosine
    )


def broken_promises(train: TrainConfig, evidence: list[RankEvidence]) -> list[str]:
    """What the method's options promise and no counter shows, one phrase each."""
    method = load_method(train.method)
    promised = method.promises(train)
    problems = []
    expected = method.local_seqlen(train)
    for rank, counters in enumerate(evidence):
        for name in sorted(promised):
            value = getattr(counters, name)
            if value == 0:
                problems.append(
                    f"rank {rank}: method '{train.method.name}' promises {name}, counted 0"
                )
            elif name == "local_seqlen" and value != expected:
                problems.append(f"rank {rank}: local_seqlen {value}, but a shard has {expected}")
    return problems


def known_factor(ratio: float, train: TrainConfig) -> str | None:
    """The quantity that `ratio` equals, if it is one that wrong code multiplies or divides by."""
    method = load_method(train.method)
    axes = method.degrees(train.world_size)
    tokens = train.seqlen * train.batch_size * train.accumulation * axes["dp"]
    quantities: dict[str, float] = {
        "sp": axes["sp"],
        **axes,
        "world_size": train.world_size,
        "accumulation": train.accumulation,
        "the number of tokens": tokens,
        **_labels(train, axes),
        "the number of local tokens": method.local_seqlen(train),
    }
    for name, value in quantities.items():
        for text, factor in (
            (f"{name} ({value:g})", value),
            (f"1 / {name} (1/{value:g})", 1 / value),
        ):
            if value > 1 and math.isclose(ratio, factor, rel_tol=1e-3):
                return text
    return None


def _labels(train: TrainConfig, axes: dict[str, int]) -> dict[str, float]:
    """Labels of a step and of a rank, where nothing but each sample's last position is ignored."""
    if train.data.mask != "none" or train.data.documents > 1 or train.accumulation > 1:
        return {}
    labels = (train.seqlen - 1) * train.batch_size * axes["dp"]
    return {"the number of labels": labels, "the number of labels / sp": labels / axes["sp"]}


def explain_failure(gate: Gate, train: TrainConfig) -> str:
    """One line: the worst parameter, and what its ratio looks like."""
    worst, of = gate.worst, "gradient"
    if gate.wrong_update:
        worst, of = gate.wrong_update, "update"
    if worst.ratio is None or worst.cosine is None:
        if not math.isclose(gate.loss, gate.truth_loss, rel_tol=TOLERANCES[train.dtype].ratio):
            return f"loss {gate.loss!r} instead of {gate.truth_loss!r}"
        if worst.error_norm is None:
            return f"{of} of {worst.parameter} is not finite"
        if gate.wrong_update:
            return f"{of} of {worst.parameter} must be zero and has norm {worst.norm:.1e}"
        return f"{of} of {worst.parameter} must be zero{_within(gate, worst, train)}"
    factor = known_factor(worst.ratio, train)
    hint = f", which is {factor}" if factor else ""
    return f"{of} of {worst.parameter}: ratio {worst.ratio:.9g}{hint}, cosine {worst.cosine:.9g}"


def _within(gate: Gate, parameter: ParameterGate, train: TrainConfig) -> str:
    """How far from zero a gradient may be that is zero but for rounding, and is."""
    rounding = precision(train)
    floor = noise_floor(parameter, scales(gate.parameters)[parameter.parameter], rounding)
    return (
        f" but for {floor:.1e} that {rounding} rounds off in its layer, and has norm "
        f"{parameter.norm:.1e} (truth {parameter.truth_norm:.1e})"
    )


def judgement(measurement: Measurement) -> str:
    """One line: why a record's comparison failed, or how close the worst parameter of a pass is."""
    if measurement.readings is None or measurement.readings.gate is None or measurement.detail:
        return f"{measurement.outcome}: {measurement.detail}"
    gate = measurement.readings.gate
    worst, inexact = gate.worst, exactness(gate, measurement.cell.train)
    if worst.ratio is None or worst.cosine is None:
        if not worst.error_norm:
            return "passed: all gradients are zero, as they must be"
        return (
            f"passed: worst {worst.parameter}, zero{_within(gate, worst, measurement.cell.train)}"
        )
    return (
        f"passed: worst {worst.parameter}, ratio - 1 {worst.ratio - 1:+.1e}, "
        f"1 - cosine {1 - worst.cosine:.1e}" + (f"; {inexact}" if inexact else "")
    )
