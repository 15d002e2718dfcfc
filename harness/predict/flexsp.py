"""The cost model of FlexSP, as its authors fitted it on 64 A100-40GB (arXiv:2412.01523, section 4.1.2). Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from alst_impl.planners.base import Cluster, Lengths, Seconds
from harness.records.published import look_up

TABLE = "flexsp_cost_model"
GPUS = 64
DEGREES = (2, 4, 8, 16, 32, 64)
"""Of the released planner, which leaves out 1."""
MODELS = ("GPT-7B", "GPT-13B", "GPT-30B")
STATE_BYTES = 16
"""Bytes of weights, gradients and optimizer states per parameter. All GPUs share them, whatever the groups."""
EXCHANGED_BYTES = 16
"""Bytes of a step's all-to-alls per token, layer and hidden unit, before they are divided among a group's GPUs."""


@dataclass(frozen=True)
class PublishedCost:
    """Seconds of a group of Ulysses sequence parallelism (`alst_impl.planners.base.Cost`)."""

    quadratic: float
    """Seconds per squared token, on one GPU."""
    linear: float
    """Seconds per token, on one GPU."""
    fixed: float
    exchanged: float
    """Bytes per token that a group exchanges in a step."""
    bandwidth: dict[int, float]
    """Bytes per second that each GPU of a group exchanges, by degree."""

    def seconds(self, lengths: Lengths, degree: int) -> Seconds:
        """Work and exchange, both divided by the degree; one GPU exchanges nothing."""
        tokens = lengths.astype(np.float64)
        return (self.work(tokens) + self.exchange(tokens, degree)) / degree

    def work(self, tokens: Seconds) -> Seconds:
        """Seconds of each document on one GPU."""
        return self.quadratic * tokens**2 + self.linear * tokens

    def exchange(self, tokens: Seconds, degree: int) -> Seconds:
        """Seconds that one GPU would take to exchange all of each document."""
        return 0 * tokens if degree == 1 else self.exchanged / self.bandwidth[degree] * tokens


def _constant(item: str, **row: object) -> float:
    return look_up(TABLE, {"item": item, **row}, "value").value


def published_cost(model: str) -> PublishedCost:
    """The cost model of one of `MODELS`."""
    size = _constant("num_layers", model=model) * _constant("hidden_size", model=model)
    mib_per_ms = {d: _constant(f"alltoall_bandwidth_sp{d}") for d in DEGREES}
    return PublishedCost(
        quadratic=_constant("alpha1_quadratic", model=model) / 1e3,
        linear=_constant("alpha2_linear", model=model) / 1e3,
        fixed=_constant("beta1_fixed", model=model) / 1e3,
        exchanged=EXCHANGED_BYTES * size,
        bandwidth={degree: rate * 2**20 * 1e3 for degree, rate in mib_per_ms.items()},
    )


def published_cluster(model: str, context_k: int) -> Cluster:
    """The GPUs, and the tokens that each holds beside its share of training states.

    Parameters grow with the longest position, because positions are learned.
    """
    limit_mib = _constant("memory_limit") * 2**10
    states_mib = _constant(f"params_at_{context_k}K", model=model) * STATE_BYTES / GPUS * 2**10
    per_token = _constant("activation_per_token", model=model, num_gpus=GPUS)
    return Cluster(GPUS, int((limit_mib - states_mib) / per_token), DEGREES)
