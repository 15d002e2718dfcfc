"""Marks the tests of weekly.yaml as `slow`; `make test` leaves them out."""

from __future__ import annotations

from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict


class Weekly(BaseModel):
    """Which cases of a test run daily all the same; by default none."""

    model_config = ConfigDict(extra="forbid")

    why: str
    daily: list[str] = []
    every: int | None = None

    def keeps(self, case: str, number: int) -> bool:
        """Whether the case, the `number`th of its test, runs daily."""
        return case in self.daily or (self.every is not None and number % self.every == 0)


def weekly() -> dict[str, Weekly]:
    """The tests of weekly.yaml, by file below `tests/` and function."""
    read = yaml.safe_load(Path(__file__).with_name("weekly.yaml").read_text())
    return {name: Weekly(**entry) for name, entry in read.items()}
