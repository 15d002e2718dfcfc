"""The verdict on a gradient comparison: tolerances, and explanations of failures.

Imports no torch; `harness.gate.gradients` computes what is judged here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

from alst_impl.config import DType, Frozen, Precision, TrainConfig
from alst_impl.layout import sizes
from alst_impl.methods.base import counted, layouts, load_method
from alst_impl.ops.attention.cores.base import load_core
from alst_impl.sources.base import load_source
from harness.records.record import Gate, Measurement, Outcome, ParameterGate


class Tolerance(Frozen):
    """Largest errors of a correct computation in one dtype, compared with the truth in fp64."""

    ratio: float
    """Largest |ratio - 1|."""
    cosine: float
    """Largest 1 - cosine."""


TOLERANCES: dict[Precision, Tolerance] = {
    # Transformers computes norms and rotary positions in fp32 for every dtype of the model.
    "float64": Tolerance(ratio=1e-6, cosine=1e-9),
    "float32": Tolerance(ratio=1e-5, cosine=1e-6),
    # 8 bits of mantissa, with errors that accumulate over layers. A wrong factor or a lost tile is far outside.
    "bfloat16": Tolerance(ratio=5e-2, cosine=1e-2),
    # 4 bits of mantissa in backward only; forward and loss are as exact as their dtype.
    # In four layers the error is at most 5e-2 of a gradient's norm, which is 1e-3 in cosine.
    "float8_e4m3fn": Tolerance(ratio=5e-2, cosine=5e-3),
}

UPDATE_TOLERANCES: dict[Precision, Tolerance] = {
    **TOLERANCES,
    # On a CPU, PyTorch's fp32 norm of half a million elements has an error of 3.5e-5, and clipping divides by it.
    "float32": Tolerance(ratio=1e-4, cosine=1e-6),
}
"""Tolerances for the change of a parameter in one update."""

ROUNDED: set[DType] = {"bfloat16"}
"""Dtypes for which the stock model also runs in that dtype, to know its own loss of accuracy."""

ROUNDING_ROOM = 2.0
"""If the stock model in a rounded dtype exceeds the tolerance, our error may be this many times the stock error.

Ratio and cosine each have their own bound.

Tiles and shards round at other places, but not more."""

EPSILON: dict[Precision, float] = {
    "float64": 2.0**-52,
    "float32": 2.0**-23,
    "bfloat16": 2.0**-7,
    "float8_e4m3fn": 2.0**-3,
}
"""Distance from 1 to the next larger number."""


def precision(train: TrainConfig) -> Precision:
    """The coarsest format that gradients of `train` depend on. It selects the tolerance."""
    return load_method(train.method).precision(train)


def scales(parameters: Iterable[ParameterGate]) -> dict[str, float]:
    """For each parameter, the norm of the largest true gradient in its decoder layer, or of the model outside layers.

    A gradient can be a small difference of large terms, and its rounding error is proportional to the terms. The
    gradients of the same layer show the size of these terms.
    """
    norms = {p.parameter: p.truth_norm or 0.0 for p in parameters}
    largest: dict[str, float] = {}
    for name, norm in norms.items():
        largest[_layer(name)] = max(norm, largest.get(_layer(name), 0.0))
    whole = max(norms.values(), default=0.0)
    return {name: largest[_layer(name)] if _layer(name) else whole for name in norms}


def without_noise(parameters: list[ParameterGate], rounding: Precision) -> list[ParameterGate]:
    """`parameters` without ratio and cosine if the truth is noise, where both have no meaning."""
    scale = scales(parameters)
    blank = {"ratio": None, "cosine": None}
    return [
        p.model_copy(update=blank) if is_noise(p, scale[p.parameter], rounding) else p
        for p in parameters
    ]


def _layer(name: str) -> str:
    """The prefix that all parameters of one decoder layer share; "" outside layers."""
    found = re.match(r".*?\.\d+\.", name)
    return found.group() if found else ""


def noise_floor(parameter: ParameterGate, scale: float, rounding: Precision) -> float:
    """Largest norm of a rounding error in format `rounding`, in a layer whose largest gradient has norm `scale`.

    0 if `rounding` is coarser than fp32 and the true gradient is not noise: its epsilon could hide a real error,
    and the stock model's own error in that dtype is known for each parameter.
    """
    if EPSILON[rounding] > EPSILON["float32"] and not is_noise(parameter, scale, rounding):
        return 0.0
    return EPSILON[rounding] * scale


def is_noise(parameter: ParameterGate, scale: float, rounding: Precision) -> bool:
    """Whether the true gradient is so small that a run in `rounding`, or in fp32, shows only rounding error."""
    epsilon = min(EPSILON[rounding], EPSILON["float32"])
    return parameter.truth_norm is not None and parameter.truth_norm <= epsilon * scale


def widened(tolerance: Tolerance, alone: ParameterGate) -> Tolerance:
    """`tolerance`, with room for an error like that of the stock model in a rounded dtype, `alone`."""
    if alone.ratio is None or alone.cosine is None:
        return tolerance
    return Tolerance(
        ratio=max(tolerance.ratio, ROUNDING_ROOM * abs(alone.ratio - 1)),
        cosine=max(tolerance.cosine, ROUNDING_ROOM * (1 - alone.cosine)),
    )


def used(parameter: ParameterGate, tolerance: Tolerance, floor: float = 0.0) -> float:
    """Used fraction of the allowed error; above 1 fails.

    An error whose norm is below `floor` passes, whatever the norm of the truth.
    """
    if parameter.error_norm is None:
        return math.inf
    if parameter.error_norm == 0:
        return 0.0
    absolute = parameter.error_norm / floor if floor else math.inf
    if parameter.ratio is None:
        return absolute
    return min(absolute, excess(parameter, tolerance))


def relative_error(parameter: ParameterGate) -> float:
    """Norm of the error divided by the norm of the truth, from ratio and cosine; 0 for a zero gradient."""
    if parameter.ratio is None or parameter.cosine is None:
        return 0.0
    squared = 1 + parameter.ratio**2 - 2 * parameter.ratio * parameter.cosine
    return math.sqrt(max(squared, 0.0))


def exactness(gate: Gate, train: TrainConfig) -> str | None:
    """If an option gives up exactness: its format and the largest error. None for an exact method."""
    if precision(train) == train.dtype:
        return None
    worst = max(gate.parameters, key=relative_error)
    return (
        f"not exact: backward computes with {precision(train)}; largest relative error "
        f"{relative_error(worst):.1e}, of {worst.parameter}"
    )


def same_mask(train: TrainConfig) -> str:
    """That the truth of a run with an attention pattern is no full attention; empty without a pattern."""
    pattern = load_core(train.attention).pattern
    return f"pattern {pattern.text}: the truth has the same mask" if pattern else ""


def excess(parameter: ParameterGate, tolerance: Tolerance) -> float:
    """Used fraction of the bound on ratio or cosine, the larger of both; above 1 fails. 0 for a zero gradient."""
    if parameter.ratio is None or parameter.cosine is None:
        return 0.0
    return max(
        abs(parameter.ratio - 1) / tolerance.ratio, (1 - parameter.cosine) / tolerance.cosine
    )


def broken_promises(train: TrainConfig, evidence: list[dict[str, int]]) -> list[str]:
    """Promises of the method's options that the counters do not confirm, one phrase each."""
    method = load_method(train.method)
    promised = method.promises(train)
    problems = []
    seqlens = load_source(train.data.source).seqlens(train.seqlen)
    expected = {method.plan([seqlen], train.world_size)[0].local for seqlen in seqlens}
    for rank, counters in enumerate(evidence):
        for name in sorted(promised):
            value = counted(counters, name)
            if value == 0:
                problems.append(
                    f"rank {rank}: method '{train.method.name}' promises {name}, counted 0"
                )
            elif name == "local_seqlen" and value not in expected:
                sizes = " or ".join(map(str, sorted(expected)))
                problems.append(f"rank {rank}: local_seqlen {value}, but a shard has {sizes}")
    return problems


def known_factor(ratio: float, train: TrainConfig) -> str | None:
    """The quantity of the run that `ratio` or its inverse equals, which points to the defect; None if there is none."""
    plan = layouts(train)
    axes = sizes(plan)
    tokens = train.seqlen * train.batch_size * train.accumulation * axes["dp"]
    quantities: dict[str, float] = {
        "sp": axes["sp"],
        **axes,
        "world_size": train.world_size,
        "accumulation": train.accumulation,
        "the number of tokens": tokens,
        **_labels(train, axes),
        "the number of local tokens": plan[0].local,
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
    """Numbers of labels of a step and of a rank, if only the last position of each sample is ignored."""
    packed = train.data.packed or load_source(train.data.source).packs
    if train.data.mask != "none" or packed or train.accumulation > 1:
        return {}
    labels = (train.seqlen - 1) * train.batch_size * axes["dp"]
    return {"the number of labels": labels, "the number of labels / sp": labels / axes["sp"]}


def explain_failure(gate: Gate, train: TrainConfig) -> str:
    """One line: the worst parameter, and the factor that its ratio equals."""
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
    """How far a gradient that must be zero may be from zero by rounding, and how far it is."""
    rounding = precision(train)
    floor = noise_floor(parameter, scales(gate.parameters)[parameter.parameter], rounding)
    return (
        f" but for {floor:.1e} that {rounding} rounds off in its layer, and has norm "
        f"{parameter.norm:.1e} (truth {parameter.truth_norm:.1e})"
    )


def in_doubt(measurement: Measurement) -> bool:
    """Whether a cell failed in a rounded dtype, so that one needs to know all that rounding can do to its gradients.

    One run of the stock model shows one draw of its rounding error. That is enough for gradients of many numbers,
    which are rounded independently. It is not where a gradient hangs on one number, as on a sum of terms that
    cancel, or where rounding sends a token to another expert.
    """
    wrong = measurement.outcome is Outcome.WRONG_GRADIENT
    return wrong and measurement.cell.train.dtype in ROUNDED


def exceptions(measurement: Measurement) -> str:
    """Why a cell passed although gradients differ from the truth by more than the tolerance; empty if none does."""
    gate = measurement.readings and measurement.readings.gate
    train = measurement.cell.train
    if not gate or not gate.passed or train.dtype not in ROUNDED:
        return ""
    tolerance, found = TOLERANCES[precision(train)], []
    if gate.choice:
        found.append(f"as in the truth where {gate.choice}")
    worst = max(gate.parameters, key=lambda p: excess(p, tolerance))
    if excess(worst, tolerance) > 1:
        found.append(
            f"{_errors(worst)} of {worst.parameter}, at most {ROUNDING_ROOM:g} times what {train.dtype} does to it "
            "in the stock model"
        )
    return "; ".join(found)


def _errors(parameter: ParameterGate) -> str:
    assert parameter.ratio is not None
    assert parameter.cosine is not None
    return f"ratio - 1 {parameter.ratio - 1:+.1e}, 1 - cosine {1 - parameter.cosine:.1e}"


def judgement(measurement: Measurement) -> str:
    """One line: why the comparison of a record failed, or its largest error and its exceptions if it passed."""
    return "; ".join(filter(None, (outcome_line(measurement), exceptions(measurement))))


def outcome_line(measurement: Measurement) -> str:
    """One line: why the comparison of a record failed, or the error of the worst parameter if it passed."""
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
    line = f"passed: worst {worst.parameter}, {_errors(worst)}"
    return "; ".join(filter(None, (line, inexact, same_mask(measurement.cell.train))))
