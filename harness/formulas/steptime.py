"""Models the time of a step: counted work over the rates that published steps reached. Imports no torch.

The parts of a step add up, but for two that overlap with computation: copies of checkpoints and of streamed
layers add what exceeds it, and collectives the share `EXPOSED` of their time and what of the rest exceeds it.
"""

from __future__ import annotations

from harness.cells.hardware import Hardware
from harness.cells.prediction import Cost, StepTime
from harness.formulas import roofline
from harness.formulas.rates import Rate, architecture

MEMORY_SHARE = 0.8
"""Share of the datasheet's memory bandwidth that elementwise operators reach."""
LINK_SHARE = 0.75
"""Share of the datasheet's bandwidth, between GPUs and to the host, that collectives and copies reach."""
EXPOSED = 0.36
"""Share of the time of collectives that computation does not hide. Layers are gathered ahead and rings send while
they compute, but not from the first layer on. Solved from Qwen3-32B, ring of 16 GPUs, 131,072 tokens
(arXiv:2602.21196, Table 3)."""
LAUNCH_SECONDS = 6e-6
"""Time of the host for one operator of PyTorch. A step cannot be faster than its operators are launched."""
HOST_UPDATES = 0.921e9
"""Parameters per second that the processors of a node update with AdamW, and copy to and from the GPUs.
Solved from Llama-8B at 32K tokens on 8 GPUs (arXiv:2506.13996, Table 3)."""
HOST_UPDATES_OF_ONE = 0.495e9
"""The same by one process. Solved from Llama-8B at 36K tokens on one GPU (arXiv:2506.13996, Table 2)."""
SPREAD = 0.15
"""Relative half-width of the interval where the rates are solved from steps on the same architecture."""
WIDE_SPREAD = 0.4
"""The same where they are derived."""


class Unknown(ValueError):
    """The time of a step cannot be modelled."""


def step_time(
    cost: Cost,
    hardware: Hardware,
    *,
    kernel: str,
    ranks: int,
    host_parameters: int = 0,
    bubble: float = 0.0,
) -> StepTime:
    """Time of a step of `cost` per rank, on `ranks` devices, with `kernel` as its attention.

    `host_parameters` of the whole model are updated in host memory, and stages of a pipeline idle for the
    fraction `bubble`. Raises `Unknown` if the speed of the hardware, or of the kernel on it, is not known.
    """
    peak, memory, products, attention = _speeds(hardware, kernel)
    parts = {
        "matrix products": cost.matmul_flops / (products.share * peak),
        "attention": cost.attention_flops / (attention.share * peak),
        "other operators": cost.pointwise_bytes / (MEMORY_SHARE * memory),
    }
    computing = sum(parts.values())
    parts["launches"] = max(cost.launches * LAUNCH_SECONDS - computing, 0.0)
    parts["copies to and from the host"] = max(_copying(cost, hardware) - sum(parts.values()), 0.0)
    sending = _sending(cost, hardware)
    hidden = min((1 - EXPOSED) * sending, computing)
    parts["links between GPUs"] = sending - hidden
    parts["update on the host"] = _updating(host_parameters, ranks, hardware)
    parts["waiting for other stages"] = sum(parts.values()) * bubble / (1 - bubble)
    least = roofline.least_seconds(cost, hardware)
    parts["datasheet's bound"] = max(least - sum(parts.values()), 0.0)
    seconds = max(sum(parts.values()), least)
    used = [products, *([attention] if cost.attention_flops else [])]
    spread = SPREAD if all(rate.fitted for rate in used) else WIDE_SPREAD
    return StepTime(
        seconds=seconds,
        low=max(seconds * (1 - spread), least),
        high=seconds * (1 + spread),
        parts=parts,
        basis=_basis(used),
    )


def _speeds(hardware: Hardware, kernel: str) -> tuple[float, float, Rate, Rate]:
    """Peak FLOP/s, memory bandwidth, and the rates of matrix products and attention."""
    peak, memory, rates = hardware.bf16_flops, hardware.memory_bandwidth, architecture(hardware)
    if peak is None or memory is None or rates is None:
        row = {
            "bf16_flops": peak,
            "memory_bandwidth": memory,
            "chip of a known compute capability": rates,
        }
        missing = next(name for name, value in row.items() if value is None)
        raise Unknown(
            f"hardware '{hardware.name}' has no {missing}; give it in a YAML file of your own"
        )
    if kernel not in rates.attention:
        known = ", ".join(sorted(rates.attention))
        raise Unknown(
            f"no speed of attention '{kernel}' on {hardware.name} is known; known are {known}"
        )
    return peak, memory, rates.products, rates.attention[kernel]


def _basis(used: list[Rate]) -> str:
    return "; ".join(dict.fromkeys(rate.source for rate in used))


def _copying(cost: Cost, hardware: Hardware) -> float:
    """Both directions at once."""
    copied = max(cost.host_in_bytes, cost.host_out_bytes)
    return copied / (LINK_SHARE * hardware.host_bandwidth) if hardware.host_bandwidth else 0.0


def _sending(cost: Cost, hardware: Hardware) -> float:
    inside, across = hardware.intra_node_bandwidth, hardware.inter_node_bandwidth
    network = cost.network_bytes / (LINK_SHARE * across) if across else 0.0
    within = (cost.link_bytes - cost.network_bytes) / (LINK_SHARE * inside) if inside else 0.0
    return network + within


def _updating(parameters: int, ranks: int, hardware: Hardware) -> float:
    node = min(ranks, hardware.devices_per_node)
    rate = min(HOST_UPDATES, node * HOST_UPDATES_OF_ONE)
    return parameters * node / ranks / rate
