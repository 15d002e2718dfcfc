"""Tables of where records come from: code, machine and library versions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from harness.present.grids.base import Grid
from harness.records.record import Provenance
from harness.records.table import Results, commit_name, machine_of


def environment_grid(results: Results) -> Grid:
    """A row per distinct origin of the records, with the number of records."""
    found = sorted(results.measurements.values(), key=lambda m: m.provenance.utc)
    counts = Counter(
        (
            commit_name(m.provenance),
            machine_of(m),
            f"Python {m.provenance.python}",
            libraries(m.provenance),
            m.provenance.utc[:10],
        )
        for m in found
    )
    return Grid(
        ["commit", "hardware", "interpreter", "libraries", "date", "records"],
        [[*origin, str(n)] for origin, n in counts.items()],
    )


def version_grid(all_results: Sequence[Results]) -> Grid:
    """A row per distinct interpreter and set of libraries, the most frequent first."""
    counts = Counter((p.python, libraries(p)) for r in all_results for p in r.provenances())
    rows = [[python, versions, str(n)] for (python, versions), n in counts.most_common()]
    return Grid(["Python", "libraries", "records"], rows)


def libraries(p: Provenance) -> str:
    """Names and versions of the libraries, by name."""
    return ", ".join(f"{name} {version}" for name, version in sorted(p.versions.items()))


def origin(results: Results) -> str:
    """Commits, machines and dates of the records, in a phrase."""
    rows = environment_grid(results).rows
    return "; ".join(f"commit {row[0]} on {row[1]}, {row[4]}" for row in rows)
