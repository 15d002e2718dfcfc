"""Hand-made records for tests of presentation, without running anything."""

from __future__ import annotations

from typing import Any

from alst_impl.config import TrainConfig
from harness.cells.cell import Cell, make_cell
from harness.cells.experiment import Quantity
from harness.cells.prediction import Flops, Holding, Prediction, SearchResult, Simulated
from harness.judge.claims import Evidence, judge
from harness.records.readings import Device, DeviceReadings, Section
from harness.records.record import (
    CudaMemory,
    Gate,
    Measurement,
    Outcome,
    ParameterGate,
    Provenance,
    RankMemory,
    Readings,
)
from harness.records.sources import fingerprint
from harness.records.table import Results

MIB = 2**20


def cell(
    method: str = "alst",
    world_size: int = 2,
    seqlen: int = 1024,
    options: dict[str, Any] | None = None,
    **settings: Any,
) -> Cell:
    """A checked cell. All ranks share one sample, except with the baseline."""
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
    """A record with every reading. `speed` and `peak` scale its times and bytes."""
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
    evidence = {
        "local_seqlen": t.seqlen // t.world_size,
        "tiles": 12,
        "exchanges": 16,
        "offloaded_bytes": 2 * MIB,
    }
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


def cuda_cell(method: str = "alst", seqlen: int = 32_768, **settings: Any) -> Cell:
    """A cell for a GPU: full width, two layers."""
    options = settings.pop("options", {})
    return make_cell(
        {
            "model": "llama3.1-8b",
            "overrides": {"num_hidden_layers": 2},
            "method": {"name": method, **options},
            "engine": "fsdp2",
            "dtype": "bfloat16",
            "seqlen": seqlen,
            "world": "cuda",
            "hardware": "h100-80gb",
            "gate": False,
            "steps": 2,
            **settings,
        }
    )


def twin_of(cell: Cell) -> Cell:
    """The same cell on a phantom device."""
    train = {name: getattr(cell.train, name) for name in TrainConfig.model_fields}
    more = {"hardware": cell.hardware, "warmup": cell.warmup, "simulation": {"search": False}}
    more["expandable_segments"] = cell.expandable_segments
    return make_cell({**train, "world": "phantom", **more})


GPU = Device(index=0, uuid="GPU-0", name="NVIDIA H100 80GB HBM3", memory_bytes=80 * 2**30)


def cuda_measurement(of: Cell | None = None, allocated: int = 20 * 2**30) -> Measurement:
    """A GPU's record with every reading. Forward has half of backward's bytes."""
    of = of or cuda_cell()
    phases = {"forward": allocated // 2, "backward": allocated, "update": allocated // 4}
    memory = RankMemory(
        peak_bytes=allocated,
        host_peak_bytes=512 * MIB,
        phase_peak_bytes=phases,
        resting_bytes=12 * 2**30,
        rss_bytes=9 * 2**30,
        attention=["aten::_scaled_dot_product_flash_attention"],
        cuda=CudaMemory(
            allocated_bytes=phases,
            reserved_bytes={name: nbytes + 2**30 for name, nbytes in phases.items()},
            device_bytes={name: nbytes + 2**31 for name, nbytes in phases.items()},
            pinned_bytes=512 * MIB,
            retries=0,
            allocator={"expandable_segments": "True"},
        ),
    )
    section = Section(
        doing="memory step, backward",
        seconds=1.5,
        readings=30,
        used_bytes=allocated + 3 * 2**30,
        process_bytes=allocated + 2**31,
        sm_hz=[1.62e9, 1.98e9],
        watts=690.0,
        celsius=64,
        throttled=["SwPowerCap"],
    )
    watched = DeviceReadings(device=GPU, before_bytes=600 * MIB, sections=[section], strangers=[])
    evidence = {
        "local_seqlen": of.train.seqlen,
        "tiles": 26,
        "exchanges": 0,
        "offloaded_bytes": 512 * MIB,
    }
    seconds = of.train.seqlen / 32_768
    return Measurement(
        cell=of,
        outcome=Outcome.OK,
        readings=Readings(
            step_s=[[seconds * (1 + 0.01 * step)] for step in range(of.steps)],
            loss=[11.8 - 0.1 * step for step in range(of.warmup + of.steps + 1)],
            grad_norm=[2.0] * (of.warmup + of.steps + 1),
            memory=[memory],
            evidence=[evidence],
            gate=gate() if of.gate else None,
            num_parameters=1_486_909_440,
            devices=[watched],
        ),
        provenance=PROVENANCE.model_copy(
            update={"device": GPU.name, "driver": "580.95.05", "cores": 16}
        ),
    )


def simulated(of: Cell, allocated: int = 20 * 2**30) -> Measurement:
    """A phantom device's record with the bytes of `cuda_measurement`, without values and times."""
    gpu = cuda_measurement(of, allocated)
    assert gpu.readings is not None
    readings = gpu.readings.model_copy(update={"loss": [], "grad_norm": [], "devices": []})
    m = searched(of, peak=allocated)
    assert m.simulated is not None
    alone = m.simulated.model_copy(update={"search": None, "checkpoint_bytes": 512 * MIB})
    return m.model_copy(update={"readings": readings, "simulated": alone})


def searched(
    of: Cell,
    longest: int = 1_000,
    slope: float = 100.0,
    peak: int = 2**30,
    holdings: list[Holding] | None = None,
) -> Measurement:
    """A phantom cell's record with its prediction and its longest sequence."""
    prediction = Prediction(
        allocated_bytes=peak,
        reserved_bytes=peak + 2**29,
        overhead_bytes=2**30,
        total_bytes=peak + 2**30,
        host_bytes=0,
        bytes_per_local_token=slope,
        by_category={"activations": peak},
        fits=True,
        limit="none",
        flops=Flops(paper_formula=1.0, model_causal=1.0),
        step_seconds_modelled=10.0,
    )
    search = SearchResult(
        longest_tokens=longest,
        shortest_failing_tokens=longest + 10,
        limit="gpu_memory",
        evaluations=3,
    )
    return Measurement(
        cell=of,
        outcome=Outcome.OK,
        readings=None,
        simulated=Simulated(
            code=fingerprint(),
            prediction=prediction,
            peak_bytes=peak,
            checkpoint_bytes=0,
            holdings=holdings or [],
            search=search,
            timeline=None,
        ),
        provenance=PROVENANCE,
    )


def claim(
    error: float | None,
    name: str = "one",
    quantity: Quantity = "longest_tokens",
    method: str = "mst",
    ruled_out: str = "",
    fitted: bool = False,
) -> Evidence:
    """Published number 100 beside ours, which is off by `error`; None is a number without a record."""
    ours = None if error is None else 100 * (1 + error)
    return Evidence(
        id=f"{name}-{quantity}",
        source="a paper, Table 1",
        published=100.0,
        unit="",
        predicted=ours,
        measured=None,
        error=None if ours is None else ours / 100 - 1,
        used_for_fit=fitted,
        verdict=judge(quantity, 100.0, ours),
        outcome=None if error is None else Outcome.OK,
        key=name,
        method=method,
        place=name,
        quantity=quantity,
        limit=None,
        ruled_out=ruled_out,
    )


def gpu_sweep(more_bytes: int = 0) -> Results:
    """Measured cells, a gate at small scale, and the phantom twin of every cell."""
    small = {"model": "tiny-llama", "overrides": {}, "seqlen": 1024, "gate": True}
    cells = [cuda_cell("alst", **small, timed=False, warmup=0, steps=0)]
    lengths = (32_768, 131_072)
    cells += [cuda_cell(method, n) for method in ("baseline", "alst") for n in lengths]
    records = {of.key: cuda_measurement(of) for of in cells}
    oom = cells[2]  # the baseline at the longer length
    records[oom.key] = failure(oom, Outcome.GPU_OOM)
    twins = [twin_of(of) for of in cells[1:]]
    records |= {of.key: simulated(of, 20 * 2**30 + more_bytes) for of in twins}
    cells.append(cuda_cell("layerwise"))  # not measured
    everything = {of.key: of for of in [*cells, *twins]}
    figures = ["measured_beside_predicted", "peak_memory", "step_time", "headline"]
    return Results("gpu_sample", "Is it right?", "made by hand", figures, everything, records)


def failure(of: Cell, outcome: Outcome) -> Measurement:
    """A record of a cell that failed before its first reading."""
    return Measurement(
        cell=of, outcome=outcome, detail="rank 1", readings=None, provenance=PROVENANCE
    )


PEERS = {"baseline": (1.4, 1.6), "deepspeed_alst": (0.9, 1.3), "alst": (1.0, 1.0)}
"""Method -> (speed, peak memory) of its sample records."""


def sweep(models: tuple[str, ...] = ("tiny-llama", "tiny-qwen3")) -> Results:
    """A small sweep with all kinds of results: one cell failed, one is wrong, one is not measured."""
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
