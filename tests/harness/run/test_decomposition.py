"""A cell whose steps have several lengths is measured under the gate, and refused where one length is foreseen."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from phantoms import NEEDED, cell, estimated

from harness.cells.cell import make_cell
from harness.records.metrics import value_of
from harness.records.record import Outcome
from harness.run.measure import measure

SOURCE = {"name": "decomposition", "shortest": 16, "curriculum": "uniform"}
CELL: dict[str, Any] = {
    "model": "tiny-llama",
    "method": {"name": "alst", "sp": 2},
    "engine": "plain",
    "world_size": 2,
    "seqlen": 128,
    "data": {"corpus": str(Path(json.__file__).parent / "decoder.py"), "source": SOURCE},
    "warmup": 0,
    "steps": 3,
    "timed": False,
    "timeout_s": 300,
}


def test_a_cell_of_several_lengths_passes_the_gate_and_trains(tmp_path: Path) -> None:
    """Tokens per second are those of all steps, which do unequal work."""
    m = measure(make_cell({**CELL, "timed": True}), tmp_path)
    assert m.outcome is Outcome.OK, m.detail
    assert m.readings is not None
    assert m.readings.gate is not None
    assert m.readings.gate.passed
    assert {rank["local_seqlen"] for rank in m.readings.evidence} <= {8, 16, 32, 64}
    steps = [max(ranks) for ranks in m.readings.step_s]
    assert set(m.readings.seqlens) <= {16, 32, 64, 128}
    assert len(set(m.readings.seqlens)) > 1
    assert len(m.readings.seqlens) == len(steps)
    assert value_of("tokens_per_s", m) == pytest.approx(3 * 128 / sum(steps))
    assert value_of("mfu", m) is None


def test_the_usual_source_is_not_mentioned() -> None:
    """So that records and keys are those from before there were others, and a record of another source has its own."""
    usual = make_cell({**CELL, "data": {}})
    assert "source" not in usual.model_dump_json()
    assert usual.key == make_cell({**CELL, "data": {"source": "excerpts"}}).key
    assert usual.key != make_cell({**CELL, "data": {"source": SOURCE}}).key
    assert type(usual).model_validate_json(usual.model_dump_json()) == usual


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"world": "phantom", "hardware": "h100-80gb"},
            "world 'phantom' plays steps of one length, but source 'decomposition' has steps of 64 and of 128 tokens; "
            "leave source out, and ask for each length by seqlen",
        ),
        (
            {"model": "tiny-qwen3-moe", "overrides": {"output_router_logits": True}},
            "gate (True) and followed (False) compare with the stock model, whose router loss would count the token "
            "after each sequence of source 'decomposition'; set both to false",
        ),
        (
            {"data": {"source": "decompose"}},
            "unknown source 'decompose'; use one of decomposition, ",
        ),
    ],
)
def test_cells_that_cannot_be_right_are_refused(changed: dict[str, Any], message: str) -> None:
    """Before anything runs."""
    settings = {k: v for k, v in CELL.items() if k not in ("warmup", "steps", "timed")} | changed
    with pytest.raises(ValueError, match=re.escape(message)):
        make_cell(settings)


def test_a_corpus_that_is_too_short_is_refused_in_its_record(tmp_path: Path) -> None:
    """In the words of the library."""
    text = tmp_path / "short.txt"
    text.write_text("short")
    m = measure(make_cell({**CELL, "data": {"corpus": str(text), "source": SOURCE}}), tmp_path)
    assert (m.outcome, "use a smaller seqlen or shortest" in (m.detail or "")) == (
        Outcome.REFUSED,
        True,
    ), m.detail


@NEEDED[0]
@NEEDED[1]
def test_each_length_is_foreseen_by_its_own_cell() -> None:
    """The way out of the refusal. With as many tokens, short sequences take as many bytes and less work."""
    lengths = {8_192: 1, 1_024: 8}
    cells = (
        cell(method="baseline", engine="plain", seqlen=seqlen, batch_size=size)
        for seqlen, size in lengths.items()
    )
    whole, short = estimated(*cells)
    assert short.allocated_bytes == whole.allocated_bytes
    assert short.cost is not None
    assert whole.cost is not None
    assert short.cost.matmul_flops == whole.cost.matmul_flops
    assert whole.cost.attention_flops == pytest.approx(8 * short.cost.attention_flops, rel=0.01)
