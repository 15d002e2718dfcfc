"""A simulated step whose gradients and optimizer states lie on the accelerator."""

from __future__ import annotations

import torch
from training import config_of

from alst_impl.engines.base import optimizer_of
from alst_impl.models import materialize
from harness.predict import STATES
from harness.worlds.sim import Offload, simulate

CONFIG = config_of(method={"name": "alst", "tiles": 2}, engine="fsdp2", seqlen=256)


def test_states_are_as_large_as_pytorchs() -> None:
    """Two copies of the parameters in their dtype for AdamW, none for plain descent."""
    for name, copies in STATES.items():
        config = config_of(optimizer={"name": name})
        parameters = list(materialize(config).parameters())
        optimizer = optimizer_of(parameters, config)
        for p in parameters:
            p.grad = torch.ones_like(p)
        optimizer.step()
        tensors = [t for state in optimizer.state.values() for t in state.values()]
        held = sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor) and t.dim())
        assert held == copies * sum(p.nbytes for p in parameters)


def test_they_are_there_at_every_peak() -> None:
    """States rest on the device from the first update on, and so do gradients while they are made."""
    away = simulate(CONFIG, offload=Offload(gradients=True))
    here = simulate(CONFIG, offload=Offload(gradients=False, states=2))
    parameters = here.phases["forward"].by_category["parameters"]
    for phase in ("forward", "backward"):
        assert here.phases[phase].by_category["optimizer"] == 2 * parameters
        assert (
            here.phases[phase].allocated_bytes
            >= away.phases[phase].allocated_bytes + 2 * parameters
        )
    assert here.phases["backward"].by_category["gradients"] > 0
    # Pages of the allocator that were half empty may take some of it.
    assert here.reserved_bytes > here.phases["backward"].allocated_bytes
