"""Hand-made records: what presentation is tested on, without running anything."""

from __future__ import annotations

from typing import Any

from harness.cell import Cell, make_cell
from harness.record import (
    Gate,
    Measurement,
    Outcome,
    ParameterGate,
    Provenance,
    RankEvidence,
    RankMemory,
    Readings,
)
from harness.table import Results

MIB = 2**20


def cell(
    method: str = "alst",
    world_size: int = 2,
    seqlen: int = 1024,
    options: dict[str, Any] | None = None,
    **settings: Any,
) -> Cell:
    """A checked cell; every rank in one sequence-parallel group, but for the baseline's."""
    options = {**({} if method == "baseline" else {"sp": world_size}), **(options or {})}
    return make_cell(
        {
            "model": "tiny-llama",
            "method": {"name": method, **options},
            "world_size": world_size,
            "seqlen": seqlen,
            **settings,
        }
    )


def gate(passed: bool = True) -> Gate:
    """A comparison of three parameters, one with a true gradient of zero."""
    error = 1e-7 if passed else 1e-2
    worst = ParameterGate(parameter="lm_head.weight", ratio=1 + error, cosine=1 - error)
    exact = ParameterGate(parameter="model.norm.weight", ratio=1.0, cosine=1.0)
    zero = ParameterGate(parameter="model.unused.weight", ratio=None, cosine=None)
    return Gate(
        passed=passed, loss=7.6001, truth_loss=7.6, worst=worst, parameters=[exact, worst, zero]
    )


PROVENANCE = Provenance(
    commit="0123456789abcdef0123456789abcdef01234567",
    dirty=False,
    device="Sample CPU @ 1 GHz",
    cores=2,
    python="3.11.7",
    versions={"torch": "2.13.0", "transformers": "5.23.0"},
    utc="2026-01-02T03:04:05+00:00",
    wall_s=12.5,
)


def measurement(
    of: Cell | None = None, speed: float = 1.0, passed: bool = True, peak: float = 1.0
) -> Measurement:
    """A record with every reading; `speed` and `peak` scale its times and bytes."""
    of = of or cell()
    t = of.train
    seconds = t.seqlen / 8192 / speed
    memory = RankMemory(
        peak_bytes=int((8 + t.seqlen / 128 / t.world_size) * peak * MIB),
        host_peak_bytes=2 * MIB,
        phase_peak_bytes={"forward": 4 * MIB, "backward": 8 * MIB, "update": 6 * MIB},
        resting_bytes=6 * MIB,
        rss_bytes=600 * MIB,
    )
    evidence = RankEvidence(
        local_seqlen=t.seqlen // t.world_size, tiles=12, exchanges=16, offloaded_bytes=2 * MIB
    )
    ranks = range(t.world_size)
    return Measurement(
        cell=of,
        outcome=Outcome.OK if passed else Outcome.WRONG_GRADIENT,
        readings=Readings(
            step_s=[[seconds * (1 + 0.1 * s + 0.01 * r) for r in ranks] for s in range(of.steps)],
            loss=[7.6 - 0.4 * s + 1e-7 * t.world_size for s in range(of.warmup + of.steps + 1)],
            grad_norm=[2.0 - 0.1 * s for s in range(of.warmup + of.steps + 1)],
            memory=[memory for _ in ranks],
            evidence=[evidence for _ in ranks],
            gate=gate(passed) if of.gate else None,
        ),
        provenance=PROVENANCE,
    )


def failure(of: Cell, outcome: Outcome) -> Measurement:
    """A record of a cell that ended before anything could be read."""
    return Measurement(
        cell=of, outcome=outcome, detail="rank 1", readings=None, provenance=PROVENANCE
    )


PEERS = {"baseline": (1.4, 1.6), "deepspeed_alst": (0.9, 1.3), "alst": (1.0, 1.0)}
"""Method -> how fast and how large its sample records are."""


def sweep(models: tuple[str, ...] = ("tiny-llama", "tiny-qwen3")) -> Results:
    """A small sweep with everything that can happen: one cell failed, one wrong, one not measured."""
    cells, measurements = {}, {}
    for model in models:
        for world_size in (1, 2, 4):
            for seqlen in (1024, 2048, 4096):
                for method, (speed, peak) in PEERS.items():
                    each = cell(method, world_size, seqlen, model=model)
                    cells[each.key] = each
                    wrong = method == "deepspeed_alst" and model == models[-1] and world_size == 4
                    measurements[each.key] = measurement(each, speed, not wrong, peak)
    oom = cell("baseline", 4, 4096, model=models[-1])
    measurements[oom.key] = failure(oom, Outcome.HOST_OOM)
    absent = cell("alst", 4, 4096, model=models[-1])
    del measurements[absent.key]
    names = ["peak_memory", "step_time", "loss_parity", "headline"]
    return Results("sample", "Does it draw?", "made by hand", names, cells, measurements)
