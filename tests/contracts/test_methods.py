"""Every method under every engine trains exactly as stock transformers. New files are tested automatically."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
from training import assert_trains_as, config_of, run_steps, truth_of

from alst_impl.config import OptimizerConfig, Spec, TrainConfig
from alst_impl.layout import mesh_shape
from alst_impl.methods.base import Method, load_method
from alst_impl.plugin import names

if TYPE_CHECKING:
    from conftest import Ranks

MEASURED = {"deepspeed_alst"}
"""Peers. Their results are measured (tests/alst_impl/test_deepspeed_alst.py), not guaranteed."""
VARIANTS: dict[str, list[dict[str, Any]]] = {"zero": [{"stage": stage} for stage in (2, 3)]}
"""Options that make an engine a different one. ZeRO stages 1 and 2 differ in when gradients are reduced."""
OPTIONS = {"sp": 2, "cp": 2, "pp": 2, "tiles": 3, "chunk": 15}
"""Options for methods that have such a field."""
REFUSED = {("seq1f1b", "zero")}
"""Pairs of method and engine that are incompatible."""


def methods() -> list[Method]:
    """Every method that trains on real tensors and guarantees the gradients of the baseline."""
    found = [
        load_method(Spec(name=name)) for name in names("alst_impl.methods") if name not in MEASURED
    ]
    return [method for method in found if not getattr(method, "simulation_only", False)]


def cells() -> list[Any]:
    """Runs with two data-parallel groups, accumulation of unequal micro-batches, a mask and an awkward length."""
    found = []
    for method in methods():
        fields = type(method).model_fields
        options = {name: value for name, value in OPTIONS.items() if name in fields}
        name = type(method).__module__.rsplit(".", 1)[-1]
        for engine in names("alst_impl.engines"):
            if (name, engine) in REFUSED:
                continue
            for variant in VARIANTS.get(engine, [{}]):
                config = config_of(
                    method={"name": name, **options},
                    engine={"name": engine, **variant},
                    world_size=2 * math.prod(options.get(axis, 1) for axis in ("sp", "cp", "pp")),
                    accumulation=2,
                    data={"mask": "prefix"},
                    # A large eps keeps the update proportional to the gradient. Adam would hide a
                    # wrong scale.
                    optimizer=OptimizerConfig(learning_rate=0.1, eps=1.0, max_grad_norm=0.5),
                )
                label = "-".join([name, engine, *(f"{k}{v}" for k, v in variant.items())])
                found.append(pytest.param(config, id=label))
    return found


@pytest.mark.parametrize("config", cells())
def test_a_method_trains_as_the_stock_model_does(ranks: Ranks, config: TrainConfig) -> None:
    """Gradients, losses, gradient norms and three clipped updates equal those of one process in fp64.

    Three, because buffers that survive a step are used again.
    """
    run = ranks(config.world_size)(run_steps, config, 3)[0]
    assert run.grad_norms[0] > 0.5  # so clipping has an effect
    assert_trains_as(run, truth_of(config, 3))


@pytest.mark.parametrize(("method", "engine"), REFUSED)
def test_incompatible_methods_and_engines_are_refused(method: str, engine: str) -> None:
    """The error comes before anything runs and gives a fix."""
    with pytest.raises(ValueError, match=f"engine '{engine}' .*; use engine"):
        load_method(Spec(name=method)).check(config_of(method=method, engine=engine))


@pytest.mark.parametrize("name", names("alst_impl.methods"))
def test_a_method_names_ranks_of_a_mesh_with_dp_and_sp(name: str) -> None:
    """Data and sharding need both axes."""
    method = load_method(Spec(name=name))
    shape = mesh_shape(method.plan([8], 4))
    assert {"dp", "sp"} <= shape.keys()
    assert math.prod(shape.values()) == 4


@pytest.mark.parametrize("kind", ["alst_impl.methods", "alst_impl.engines"])
def test_plug_ins_are_found_by_file_name(kind: str) -> None:
    """There is no registry."""
    found = names(kind)
    assert "base" not in found
    assert {"baseline", "alst"} <= set(found) or {"plain", "zero", "fsdp2"} <= set(found)
