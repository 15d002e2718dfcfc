"""Groups of several degrees in one batch train exactly as the stock model does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from training import (
    assert_same_gradients,
    assert_trains_as,
    config_of,
    run_steps,
    truth_of,
)

if TYPE_CHECKING:
    from conftest import Ranks

DOCUMENTS = [61, 13, 7, 29, 3]


@pytest.mark.parametrize("engine", ["plain", "fsdp2"])
@pytest.mark.parametrize(("dtype", "exact"), [("float64", 1e-12), ("float32", 1e-5)])
def test_gradients_are_those_of_the_stock_model(
    ranks: Ranks, engine: str, dtype: str, exact: float
) -> None:
    """Which sees each sample alone, in fp64."""
    config = config_of(
        method={"name": "flexsp", "sp": 4, "tokens": 17, "tiles": 3},
        engine=engine,
        dtype=dtype,
        world_size=4,
        accumulation=2,
        data={"documents": DOCUMENTS, "mask": "prefix"},
    )
    run, truth = ranks(4)(run_steps, config, 3)[0], truth_of(config, 3)
    assert_same_gradients(run.gradients, truth.gradients, exact, exact)
    assert_trains_as(run, truth)
