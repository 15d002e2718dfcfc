"""Which of transformers' causal language models each method trains exactly."""

from __future__ import annotations

from collections.abc import Sequence

from harness.present.grids.base import MISSING, Grid
from harness.present.pages.base import Committed
from harness.present.render import render
from harness.records.families import Family
from harness.records.record import Outcome


def page(c: Committed) -> str:
    """A row per model type, a column per method, and the reasons of refusals and exceptions."""
    (_, counts), (_, grid), (_, reasons) = tables(c)
    return render(
        "families.md",
        models=len(grid.rows),
        counts=counts,
        versions=_versions(c.families),
        grid=grid,
        reasons=reasons,
    )


def tables(c: Committed) -> list[tuple[str, Grid]]:
    """How many types passed by method, every type with every method, and the reasons: title and table of each."""
    found = c.families
    methods = list(dict.fromkeys(each.method for each in found))
    models = list(dict.fromkeys(each.model for each in found))
    reasons = _reasons(found)
    rows = [
        [
            model,
            *(
                _cell([f for f in found if (f.model, f.method) == (model, m)], reasons)
                for m in methods
            ),
        ]
        for model in models
    ]
    numbered = [[str(number), reason] for reason, number in reasons.items()]
    counts = Grid(["method", *_dtypes(found)], [[m, *_counts(found, m)] for m in methods])
    return [
        ("Model types of transformers by method", counts),
        ("Every model type with every method", Grid(["model type", *methods], rows)),
        ("Why model types are refused or fail", Grid(["", "reason"], numbered)),
    ]


def _dtypes(found: Sequence[Family]) -> list[str]:
    return list(dict.fromkeys(each.dtype for each in found))


def _counts(found: Sequence[Family], method: str) -> list[str]:
    """By dtype: how many model types passed, were refused and failed."""
    words = []
    for dtype in _dtypes(found):
        outcomes = [f.outcome for f in found if (f.method, f.dtype) == (method, dtype)]
        passed, refused = outcomes.count(Outcome.OK), outcomes.count(Outcome.REFUSED)
        failed = len(outcomes) - passed - refused
        words.append(f"{passed} passed, {refused} refused, {failed} failed")
    return words


def _versions(found: Sequence[Family]) -> str:
    ran = [f for f in found if f.transformers]
    names = {f"transformers {f.transformers}, torch {f.torch}" for f in ran}
    return "; ".join(sorted(names)) or MISSING


def _reasons(found: Sequence[Family]) -> dict[str, int]:
    """What was refused, failed or passed with exceptions says, numbered."""
    said = dict.fromkeys(filter(None, map(_reason, found)))
    return {reason: number for number, reason in enumerate(said, 1)}


def _reason(each: Family) -> str:
    """The message, without the path of the model; empty if it passed without exceptions."""
    if each.outcome is Outcome.OK:
        return each.exceptions
    return each.detail.replace(f"tests/families/{each.model}.json", each.model)


def _cell(dtypes: Sequence[Family], reasons: dict[str, int]) -> str:
    """One word for all dtypes if they agree."""
    words = [_word(each, reasons) for each in dtypes]
    if len(set(words)) == 1:
        return words[0]
    pairs = zip(dtypes, words, strict=True)
    return ", ".join(f"{each.dtype} {word}" for each, word in pairs)


def _word(each: Family, reasons: dict[str, int]) -> str:
    reason = _reason(each)
    kind = "passed" if each.outcome is Outcome.OK else each.outcome.value
    return f"{kind} ({reasons[reason]})" if reason else kind


def summary(c: Committed) -> list[tuple[str, str]]:
    """How many model types each method trains exactly, in fp32."""
    found = [f for f in c.families if f.dtype == "float32"]
    methods = dict.fromkeys(f.method for f in found)
    models = len({f.model for f in found})
    words = [
        f"`{m}` {sum(f.outcome is Outcome.OK for f in found if f.method == m)}" for m in methods
    ]
    if not words:
        return []
    return [(f"model types of transformers trained exactly, of {models}", ", ".join(words))]
