"""Uses the features of a device one by one, and prints the results as JSON."""

import json

import torch

MIB = 2**20
found = {}


def values() -> None:
    """Results of copies, fills and a kernel."""
    numbers = torch.arange(1000, dtype=torch.int64)
    there = numbers.to("cuda")
    found["round trip"] = bool((there.cpu() == numbers).all())
    found["clone"] = bool((there.clone().cpu() == numbers).all())
    found["fills"] = [
        torch.full((3,), value, dtype=dtype, device="cuda").tolist()
        for value, dtype in (
            (7, torch.int64),
            (1.5, torch.bfloat16),
            (2.5, torch.float32),
            (True, torch.bool),
        )
    ]
    several = [torch.zeros(n, dtype=torch.int64, device="cuda") for n in (3, 5)]
    torch._foreach_copy_(several, [there[10:13], there[20:25]])
    found["list"] = [x.tolist() for x in several]
    found["its source"] = there[10].item()
    torch._foreach_add_(several, 1)
    found["list after a kernel"] = several[0][0].item()
    there.add_(1)
    found["after a kernel"] = there.cpu()[5].item()


def memory() -> None:
    """The allocator, on two devices."""
    first = torch.empty(100 * MIB, dtype=torch.uint8, device="cuda:0")
    second = torch.empty(300 * MIB, dtype=torch.uint8, device="cuda:1")
    found["allocated"] = [
        torch.cuda.memory_allocated(0) >= 100 * MIB,
        torch.cuda.memory_allocated(1),
    ]
    found["used"] = [torch.cuda.device_memory_used(device) for device in (0, 1)]
    with torch.cuda.device(0):  # freed on the tensor's device, not on the current one
        del second
        torch.cuda.empty_cache()
    found["used after"] = torch.cuda.mem_get_info(1)[1] - torch.cuda.mem_get_info(1)[0]
    del first


def host() -> None:
    """Page-locked memory: rounded to a power of two by PyTorch."""
    kept = torch.empty(5_000_000, dtype=torch.uint8, pin_memory=True)
    found["pinned"] = [kept.is_pinned(), kept[1000:].is_pinned(), torch.empty(10).is_pinned()]
    found["pinned bytes"] = torch.cuda.host_memory_stats()["allocated_bytes.current"]


def order() -> None:
    """Streams and events."""
    side = torch.cuda.Stream(priority=-1)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    with torch.cuda.stream(side):
        side.wait_event(begin)
        torch.ones(1000, device="cuda").mul_(2)
        end.record(side)
    torch.cuda.synchronize()
    found["event time"] = str(begin.elapsed_time(end))
    found["done"] = [end.query(), side.query()]


def attention() -> None:
    """Flash attention is chosen, and has its log-sum-exp."""
    q = torch.empty(1, 4, 256, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward()


def segments() -> None:
    """Expandable segments."""
    torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
    kept = [torch.empty(30 * MIB, dtype=torch.uint8, device="cuda") for _ in range(4)]
    found["expandable"] = any(s["is_expandable"] for s in torch.cuda.memory_snapshot())
    del kept


def nvml() -> None:
    """Readings of the suite's sampler, a separate process."""
    from harness.devices.nvml import library, visible_devices
    from harness.devices.sampler import Sampler
    from harness.records.readings import Device

    devices = visible_devices(library(), None)
    found["devices"] = [device.name for device in devices]
    assert isinstance(devices[0], Device)
    kept = torch.empty(1000 * MIB, dtype=torch.uint8, device="cuda")
    with Sampler(devices[:1]) as sampler:
        sampler.hear({"event": "progress", "rank": 0, "doing": "holding"})
    found["sampled"] = [
        reading.used_bytes for each in sampler.readings for reading in each.sections
    ]
    del kept


for part in (values, memory, host, order, attention, segments, nvml):
    part()
print(json.dumps(found))
