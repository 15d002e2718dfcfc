"""Dataset Decomposition's published plan, made again from the sizes of its buckets, and what a run by it costs.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from alst_impl.sources.decomposition import Curriculum, shares, weights
from harness.judge.claims import Derived, Evidence, judge, predicted
from harness.records.published import look_up, rows
from harness.records.table import Results

EXPERIMENT = "decomposition"
"""The experiment with a forecast of each length."""
CURRICULUM: Curriculum = "grow_p2"
GPUS, SHARD_TOKENS = 8, 2**20
"""Of the authors' example: each GPU reads shards of its own, so that a share is whole shards for all of them."""
STEP_TOKENS = 64 * 8192
"""Tokens of a step."""
SHORT = 2_048
"""The published cost of the run is that of one in sequences of this length."""


@dataclass(frozen=True)
class Plan:
    """A cycle of the curriculum, from the shortest bucket to the longest."""

    steps: dict[int, int]
    """Tokens of a sequence -> steps of a cycle."""
    weights: dict[int, int]
    """Tokens of a sequence -> weight in the draw of a step."""

    @property
    def sequences(self) -> dict[int, int]:
        """Tokens of a sequence -> sequences of a cycle."""
        return {length: steps * STEP_TOKENS // length for length, steps in self.steps.items()}

    def mean(self, of_length: Mapping[int, float]) -> float | None:
        """Mean over the steps of what is given by length; None if a length is missing."""
        if not self.steps.keys() <= of_length.keys():
            return None
        total = sum(steps * of_length[length] for length, steps in self.steps.items())
        return total / sum(self.steps.values())


def planned() -> Plan:
    """The plan of the authors' example, from their table of the DCLM subset."""
    buckets = [r for r in rows("dataset_decomposition_buckets") if r["dataset"].startswith("DCLM")]
    lengths = [int(r["sequence_length_tokens"]) for r in buckets]
    wanted = _fact("example_tokens") / _fact("cycles")
    unit = GPUS * SHARD_TOKENS
    found = shares([int(r["tokens"]) for r in buckets], wanted, unit)
    steps = [share * unit // STEP_TOKENS for share in found]
    return Plan(
        steps=dict(zip(lengths, steps, strict=True)),
        weights=dict(zip(lengths, weights(found, CURRICULUM), strict=True)),
    )


def mean_length(dataset: str) -> float:
    """Tokens of the sequence that a token of `dataset` is in, on the mean over all tokens of its published buckets."""
    buckets = [r for r in rows("dataset_decomposition_buckets") if r["dataset"] == dataset]
    tokens = [int(r["tokens"]) for r in buckets]
    lengths = [int(r["sequence_length_tokens"]) for r in buckets]
    return sum(n * length for n, length in zip(tokens, lengths, strict=True)) / sum(tokens)


def step_seconds(results: Results) -> dict[int, float]:
    """Tokens of a sequence -> predicted seconds of a step, where the forecast has a record."""
    found = {
        cell.train.seqlen: predicted("step_seconds", results.measurements.get(key))
        for key, cell in results.cells.items()
        if cell.traits.forecast
    }
    return {length: seconds for length, seconds in found.items() if seconds is not None}


def evidence(results: Results) -> list[Evidence]:
    """Published numbers of the authors' example that follow from others by their rules, and what their run costs.

    `results` are those of `EXPERIMENT`.
    """
    plan = planned()
    return [
        *_counts("sequences", "example_seq_per_epoch", plan.sequences),
        *_counts("weight", "example_mix_weights", plan.weights),
        _of_fact("cost-over-2k", "equal_cost_ratio", "ratio", cost_over(step_seconds(results))),
        _of_fact("steps-to-accuracy", "speedup_to_target_accuracy_max", "ratio", None),
    ]


def cost_over(seconds: Mapping[int, float], length: int = SHORT) -> float | None:
    """Time of the planned run over one with as many tokens in sequences of `length`; None if a time is missing.

    `seconds` are those of a step of each length.
    """
    mean = planned().mean(seconds)
    return None if mean is None or length not in seconds else mean / seconds[length]


def _counts(name: str, item: str, ours: Mapping[int, int]) -> Iterator[Evidence]:
    """A number for each bucket."""
    row = _row(item)
    for (length, count), text in zip(ours.items(), row["value"].split(), strict=True):
        yield _evidence(f"{name}-{length}", row, float(text), "count", float(count))


def _of_fact(name: str, item: str, quantity: Derived, ours: float | None) -> Evidence:
    return _evidence(name, _row(item), _fact(item), quantity, ours)


def _evidence(
    name: str, row: Mapping[str, str], published: float, quantity: Derived, ours: float | None
) -> Evidence:
    return Evidence(
        id=f"{EXPERIMENT}-{name}",
        source=f"{row['source']}, {row['source_locator']}",
        published=published,
        unit="1" if quantity == "count" else "x",
        predicted=ours,
        measured=None,
        error=None if ours is None else ours / published - 1,
        used_for_fit=False,
        verdict=judge(quantity, published, ours),
        outcome=None,
        key="",
        method=EXPERIMENT,
        place=f"dataset_decomposition_facts {row['item']} {name}",
        quantity=quantity,
        limit=None,
        ruled_out="",
    )


def _row(item: str) -> dict[str, str]:
    (found,) = (r for r in rows("dataset_decomposition_facts") if r["item"] == item)
    return found


def _fact(item: str) -> float:
    return look_up("dataset_decomposition_facts", {"item": item}, "value").value
