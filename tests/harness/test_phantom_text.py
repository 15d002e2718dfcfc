"""What `alst phantom` prints."""

from __future__ import annotations

import pytest

from harness.commands.phantom import phantom, text
from harness.phantom.session import DeviceUse, Process, Result

GIB = 2**30


def process(rank: int, reserved: int, stands_for: int = 1) -> Process:
    """A process that used one device of 80 GiB."""
    use = DeviceUse(
        device=rank, name="a device", total_bytes=80 * GIB, allocated_bytes=reserved // 2, reserved_bytes=reserved,
        retries=0, ooms=0, alive=[],
    )  # fmt: skip
    return Process(
        pid=1, rank=rank, stands_for=stands_for, devices=[use], pinned_bytes=0, pageable_bytes=0, launches=0, matmuls=0, matmul_flops=0,
        attention=[], refused=[], reads=[], oom=None, error=None,
    )  # fmt: skip


def result(*processes: Process, hollow_host: bool = False) -> Result:
    """A command that fits."""
    return Result(
        verdict="fits", reason="ran to its end", command=["./run.sh"], hardware="h100-80gb", gpus=8, rank=None,
        hollow_host=hollow_host, seconds=12.3, processes=list(processes),
    )  # fmt: skip


def test_the_last_line_is_the_verdict_with_its_bytes() -> None:
    """It names the rank that ran for all, and says that values on the host are missing."""
    last = text(result(process(3, 40 * GIB, stands_for=8), hollow_host=True)).splitlines()[-1]
    assert last == (
        "fits: ran to its end; 40.00 of 80.00 GiB reserved, 20.00 allocated on h100-80gb; rank 3 ran for all 8; "
        "large tensors on the host were not written (--hollow-host) (12.3 s here)"
    )


def test_the_verdict_is_of_the_fullest_device() -> None:
    """Ranks that ran themselves are not named."""
    last = text(result(process(0, 10 * GIB), process(1, 30 * GIB))).splitlines()[-1]
    assert last.startswith("fits: ran to its end; 30.00 of 80.00 GiB reserved")
    assert "ran for all" not in last


def test_one_rank_and_all_ranks_exclude_each_other() -> None:
    """The message says what to leave out."""
    with pytest.raises(ValueError, match="--rank 1 runs one rank, and --all-ranks all; leave one"):
        phantom(["torchrun", "train.py"], rank=1, all_ranks=True)
