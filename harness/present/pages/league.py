"""The league: what stacks of others hold beside our own methods, how long a sequence they train, and who is exact."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from alst_impl.models import described
from harness.cells.hardware import load_hardware
from harness.cells.league import Peer, Published, Task, league, peers
from harness.cells.units import bytes_text, error_text, length_text, percent_text
from harness.present.grids.base import MISSING, Grid
from harness.present.pages.base import Committed
from harness.present.render import render
from harness.records.league import Record, Step, committed
from harness.records.published import look_up

GIB, GB = 2**30, 10**9
IMAGE = "league.png"
BF16 = 2
"""Bytes of a number."""
SHOWN = ("qwen3-8b", 8)
"""Model and GPUs of the figure and of what is alive."""
LARGEST = 3
"""Lines of a program that are named for what is alive."""


def page(_: Committed) -> str:
    """The page of the committed records."""
    return text(committed())


def text(found: dict[str, Record]) -> str:
    """Tables of memory, gradients and published numbers of the records `found`, and what each row is."""
    asked = league()
    return render(
        "league.md",
        image=IMAGE,
        records=len(found),
        hardware=asked.hardware,
        outside={gpus: f"{gib:g}" for gpus, gib in asked.outside_gib.items()},
        places=[
            (model, gpus, states, grid)
            for model in asked.models
            for gpus, states in asked.states.items()
            if (grid := memory_grid(found, model, gpus)).rows
        ],
        gate=gate_grid(found),
        published=published_grid(found),
        shown=SHOWN,
        alive=alive_grid(found),
        rows=[(name, peer, version_of(found, name)) for name, peer in peers().items()],
        faults=[(peer.title, fault) for peer in peers().values() for fault in peer.faults],
        absent=absent(found),
    )


def of_place(
    found: dict[str, Record], name: str, model: str, gpus: int
) -> tuple[dict[int, Record], Record | None]:
    """Records of a peer's lengths by length, and of its longest sequence."""
    records = [
        r for r in found.values() if (r.task.peer, r.task.model, r.task.gpus) == (name, model, gpus)
    ]
    lengths = {r.task.seqlen: r for r in records if r.task.what == "bytes"}
    return lengths, next((r for r in records if r.task.what == "longest"), None)


def slope(steps: Iterable[Step], shards: int) -> float | None:
    """Bytes that one more token of a rank takes, between the two longest of `steps` that fit; None with less than two."""
    ordered = sorted(steps, key=lambda step: step.seqlen)
    if len(ordered) < 2:
        return None
    first, last = ordered[-2:]
    return (last.allocated_bytes - first.allocated_bytes) / (last.seqlen - first.seqlen) * shards


def fitting(lengths: dict[int, Record], longest: Record | None = None) -> list[Step]:
    """Steps that fit."""
    steps = [r.step for r in lengths.values() if r.verdict == "fits" and r.step]
    return [*steps, *([longest.step] if longest and longest.step else [])]


def shards_of(name: str, gpus: int) -> int:
    """Ranks that share a sample."""
    return gpus if peers()[name].sequence_parallel else 1


def memory_grid(found: dict[str, Record], model: str, gpus: int) -> Grid:
    """A row per peer with records: allocated and reserved bytes by length, the slope, the longest sequence."""
    asked = league()
    rows = []
    for name, peer in peers().items():
        lengths, longest = of_place(found, name, model, gpus)
        if not lengths and longest is None:
            continue
        per_token = slope(fitting(lengths), shards_of(name, gpus))
        rows.append(
            [
                peer.title,
                *(_at(lengths.get(seqlen)) for seqlen in asked.seqlens),
                MISSING if per_token is None else bytes_text(per_token),
                _longest(longest),
                _on_host(fitting(lengths, longest), gpus),
                exactness(found, name),
            ]
        )
    headings = [f"{length_text(seqlen)}: allocated / reserved" for seqlen in asked.seqlens]
    more = ["a token of a rank", "longest sequence", "host memory of a node", "gradients"]
    return Grid(["stack", *headings, *more], rows)


def _at(record: Record | None) -> str:
    if record is None:
        return MISSING
    if record.verdict != "fits" or record.step is None:
        return record.verdict
    step = record.step
    return f"{step.allocated_bytes / GIB:.1f} / {step.reserved_bytes / GIB:.1f} GiB"


def _longest(record: Record | None) -> str:
    if record is None:
        return MISSING
    if record.step is None or record.verdict != "fits":
        return record.verdict
    return length_text(record.step.seqlen)


def _on_host(steps: list[Step], gpus: int) -> str:
    """Host memory of a node, at the longest step that fits."""
    if not steps:
        return MISSING
    step = max(steps, key=lambda each: each.seqlen)
    node = min(gpus, load_hardware(league().hardware).devices_per_node)
    return f"{bytes_text(step.host_bytes * node)} at {length_text(step.seqlen)}"


def exactness(found: dict[str, Record], name: str) -> str:
    """Which cases of the gate a peer passes, in words."""
    asked = list(league().gate.cases)
    judged = {
        r.task.case: r for r in found.values() if r.task.what == "gate" and r.task.peer == name
    }
    if not judged:
        return "not judged"
    wrong = [case for case in asked if case in judged and judged[case].verdict == "wrong"]
    right = sum(r.verdict == "right" for r in judged.values())
    said = f"right in {right} of {len(asked)}"
    return f"{said}, wrong: {', '.join(wrong)}" if wrong else said


def gate_grid(found: dict[str, Record]) -> Grid:
    """A row per peer, a column per case: the relative error of the worst gradient."""
    asked = list(league().gate.cases)
    rows = [
        [peer.title, *(_judged(found, name, peer, case) for case in asked)]
        for name, peer in peers().items()
    ]
    return Grid(["stack", *asked], rows)


def _judged(found: dict[str, Record], name: str, peer: Peer, case: str) -> str:
    record = found.get(Task(peer=name, what="gate", case=case).key)
    if record is None:
        return "cannot" if {case, "gate"} & peer.cannot.keys() else MISSING
    gradient = record.gradient
    if gradient is None:
        return f"{record.verdict}: {record.reason}"
    if record.verdict == "right":
        return f"right, {error_text(gradient.error or 0.0)}"
    if not gradient.wrong_parameters:
        return f"wrong: {record.reason}"
    of = f"{gradient.wrong_parameters} of {gradient.parameters} gradients"
    return (
        f"wrong: {of}, ratio {gradient.ratio:.4f}, cosine {gradient.cosine:.4f}"
        if gradient.ratio is not None and gradient.cosine is not None
        else f"wrong: {of}"
    )


def published_grid(found: dict[str, Record]) -> Grid:
    """A row per published number: ours beside it, and the error."""
    rows = [
        row
        for name, peer in peers().items()
        for claim in peer.published
        for row in _published(found, name, peer, claim)
    ]
    return Grid(["stack", "run", "quantity", "published", "predicted", "error", "source"], rows)


def _published(
    found: dict[str, Record], name: str, peer: Peer, claim: Published
) -> Iterator[list[str]]:
    lengths, longest = of_place(found, name, claim.model, claim.gpus)
    at = lengths.get(claim.seqlen or 0)
    step = at.step if at is not None and at.verdict == "fits" else None
    run = f"{claim.model}, {claim.gpus} GPU{'s' if claim.gpus > 1 else ''}"
    run += f", {length_text(claim.seqlen)}" if claim.seqlen else ""
    for quantity, column in claim.columns.items():
        number = look_up(claim.table, claim.row, column)
        ours: float | None = None
        if quantity == "longest_tokens":
            ours = longest.step.seqlen if longest and longest.step else None
            texts = length_text(number.value), MISSING if ours is None else length_text(ours)
        else:
            outside = round(league().outside_gib[claim.gpus] * GIB)
            if step is not None:
                held = step.reserved_bytes + outside
                ours = (held if quantity == "device_bytes" else step.allocated_bytes) / GB
            texts = f"{number.value:g} GB", MISSING if ours is None else f"{ours:.1f} GB"
        error = MISSING if ours is None else percent_text(ours / number.value - 1)
        yield [peer.title, run, quantity.replace("_", " "), *texts, error, number.source]


def alive_grid(found: dict[str, Record]) -> Grid:
    """A row per peer: its largest holders at the peak at the longest common length, in hidden states of a rank."""
    model, gpus = SHOWN
    rows = []
    for name, peer in peers().items():
        steps = fitting(of_place(found, name, model, gpus)[0])
        if not steps:
            continue
        step = max(steps, key=lambda each: each.seqlen)
        unit = hidden_state(model, step.seqlen // shards_of(name, gpus))
        held = [f"{each.where}: {each.bytes / unit:.1f}" for each in step.alive[:LARGEST]]
        rows.append(
            [
                peer.title,
                length_text(step.seqlen),
                f"{step.allocated_bytes / unit:.1f}",
                ", ".join(step.attention) or MISSING,
                "; ".join(held),
            ]
        )
    return Grid(
        ["stack", "at", "all", "attention kernels", "largest, and the line that made them"], rows
    )


def hidden_state(model: str, tokens: int) -> int:
    """Bytes of one hidden state of `tokens` in bf16."""
    width: int = described(model)["hidden_size"]
    return BF16 * width * tokens


def version_of(found: dict[str, Record], name: str) -> str:
    """Version of the package that the records of a peer were made with."""
    return next((r.version for r in found.values() if r.task.peer == name and r.version), MISSING)


def absent(found: dict[str, Record]) -> list[tuple[str, str]]:
    """Peers without any record, and why."""
    seen = {r.task.peer for r in found.values() if r.verdict != "not installed"}
    return [
        (peer.title, peer.cannot.get("bytes", "its packages are not here, or it was not run"))
        for name, peer in peers().items()
        if name not in seen
    ]


def summary(_: Committed) -> list[tuple[str, str]]:
    """Nothing: the README has no room for it."""
    return []
