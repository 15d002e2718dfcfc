"""Refusals before anything runs: the wrong machine, the wrong launcher, uncommitted changes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from fake_nvml import H100, FakeNvml, device

from harness.__main__ import main
from harness.cells.cell import Cell, make_cell
from harness.devices import machine, nvml
from harness.devices.machine import (
    known_device,
    rank_environment,
    require_attention,
    require_devices,
    some_devices,
)
from harness.processes.launch import Launch
from harness.records.provenance import Checkout

CUDA: dict[str, Any] = {
    "model": "tiny-llama",
    "method": "alst",
    "engine": "plain",
    "dtype": "bfloat16",
    "seqlen": 64,
    "world": "cuda",
    "hardware": "h100-80gb",
}
YAML = """
question: Which?
source: here
base: {model: tiny-llama, method: alst, engine: plain, seqlen: 64, world: cuda, hardware: h100-80gb}
sweeps: [{axes: {dtype: [bfloat16]}}]
"""


def cell(**changes: Any) -> Cell:
    """A cell of world `cuda`."""
    return make_cell({**CUDA, **changes})


@pytest.fixture(autouse=True)
def no_visible_devices_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller's environment may hide devices."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Exit code of the command line."""
    monkeypatch.setattr("sys.argv", ["alst", *arguments])
    with pytest.raises(SystemExit) as left:
        main()
    return int(left.value.code or 0)


def use(monkeypatch: pytest.MonkeyPatch, *devices: dict[str, Any]) -> None:
    """Make NVML report `devices`."""
    monkeypatch.setattr(nvml, "library", lambda: FakeNvml(list(devices)))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """`run(*options)` runs a CUDA experiment. Returns exit code, output and written files."""
    path = tmp_path / "one.yaml"
    path.write_text(YAML)
    results = tmp_path / "results"

    def call(*options: str) -> tuple[int, str, list[Path]]:
        code = command(monkeypatch, "run", str(path), "--results", str(results), *options)
        return code, capsys.readouterr().err, list(results.rglob("*"))

    return call


def assert_refused(refused: tuple[int, str, list[Path]], *words: str) -> None:
    """Asserts one line, exit code 2, and no files."""
    code, said, written = refused
    assert code == 2
    (line,) = said.splitlines()
    assert all(word in line for word in words), line
    assert written == []


def test_a_machine_without_a_gpu_is_refused(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the missing driver, and nothing runs."""

    def absent() -> None:
        raise ValueError("found no NVIDIA driver (NVML: NVML Shared Library Not Found)")

    monkeypatch.setattr(nvml, "library", absent)
    assert_refused(run(), "world 'cuda'", "found no NVIDIA driver")


def test_another_device_is_refused(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record names its hardware, so a cell only runs on that hardware."""
    use(monkeypatch, device(0, name="NVIDIA H200"))
    assert_refused(run(), "'h100-80gb'", H100, "'NVIDIA H200'", "that is 'h200-141gb'")


def test_a_part_of_the_right_device_is_refused(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A MIG instance has less memory and another speed."""
    parts = [{"uuid": "MIG-0", "name": f"{H100} MIG 3g.40gb"}]
    use(monkeypatch, device(0, mig=parts))
    assert_refused(run(), "MIG 3g.40gb", "MIG has split")


def test_hidden_devices_are_refused(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the variable that hides them."""
    use(monkeypatch, device(0))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert_refused(run(), "needs 1 devices", "0 visible", "CUDA_VISIBLE_DEVICES=-1")


def test_an_unclean_tree_is_refused(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA record names the commit that made it, unless `--allow-dirty` is given."""
    use(monkeypatch, device(0))
    monkeypatch.setattr(machine, "checkout", lambda: Checkout("abc", ["harness/new.py", "x"]))
    assert_refused(run(), "(harness/new.py and 1 more)", "--allow-dirty")
    monkeypatch.setattr(machine, "checkout", lambda: None)
    assert_refused(run(), "no checkout with a commit", "--allow-dirty")


def test_a_build_without_cuda_is_refused(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch cannot use the device. This is an error of the installation, not an outcome of the cell."""
    use(monkeypatch, device(0))
    monkeypatch.setattr(machine, "version", lambda _: "2.13.0+cpu")
    assert_refused(run("--allow-dirty"), "torch 2.13.0+cpu was built without CUDA")


def test_the_devices_of_a_cell_are_the_first_visible_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes as many devices as it has ranks on this machine, in CUDA's order. Other devices do not matter."""
    fake = FakeNvml([device(0, name="NVIDIA L4"), device(1), device(2)])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,1,0")
    found = require_devices(cell(world_size=2), None, fake)
    assert [d.index for d in found] == [2, 1]
    with pytest.raises(ValueError, match="'NVIDIA L4'"):
        require_devices(cell(world_size=3), None, fake)


def test_several_nodes_need_a_launcher() -> None:
    """One machine has too few GPUs for several nodes. Under torchrun a process only needs those of its own node."""
    eight = FakeNvml([device(n) for n in range(8)])
    sixteen = cell(world_size=16)
    with pytest.raises(
        ValueError, match="needs 16 devices on this machine, but 8 visible; start it under"
    ):
        require_devices(sixteen, None, eight)
    launch = Launch(
        rank=8, world_size=16, local_rank=0, local_world_size=8, address="node1", port=1
    )
    assert len(require_devices(sixteen, launch, eight)) == 8
    with pytest.raises(ValueError, match="lower --nproc-per-node"):
        require_devices(sixteen, launch, FakeNvml([device(0)]))


def test_ranks_get_the_clients_allocator_and_device_settings() -> None:
    """The settings are the client's, not those of the process that started the server. Other
    variables are not passed on.
    """
    ours = {"CUDA_VISIBLE_DEVICES": "GPU-1", "NCCL_DEBUG": "INFO", "HOME": "/root"}
    assert rank_environment(True, ours) == {
        "CUDA_VISIBLE_DEVICES": "GPU-1",
        "NCCL_DEBUG": "INFO",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    }
    off = rank_environment(False, {"CUDA_DEVICE_ORDER": "FASTEST_FIRST"})
    assert off["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:False"
    assert off["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"  # NVML counts in this order


def test_a_missing_package_is_named_before_anything_runs() -> None:
    """No other kernel replaces it."""
    require_attention("sdpa_cudnn")
    with pytest.raises(ValueError, match="FlashAttention-3, built from the folder hopper"):
        require_attention("flash_attention_3")


def test_a_package_that_is_there_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is found by the name of its module, without an import."""
    for name in ("flash_attn", "flash_attn_interface"):
        (tmp_path / f"{name}.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("flash_attention_2", "flash_attention_3", "flash_attention_4"):
        require_attention(name)


def test_a_machine_without_devices_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Either there are none, or all are hidden."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(ValueError, match="NVML counts none"):
        some_devices(FakeNvml([]))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES= hides all"):
        some_devices(FakeNvml([device(0)]))


def test_a_device_without_a_row_is_refused() -> None:
    """A measurement belongs to a hardware row. The fix is to write one."""
    assert known_device(FakeNvml([device(0)]))[0] == "h100-80gb"
    with pytest.raises(ValueError, match="'NVIDIA L4', which no file in harness"):
        known_device(FakeNvml([device(0, name="NVIDIA L4")]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"world": "cpu", "hardware": "cpu", "attention": "sdpa_cudnn"}, ["CUDA device", "'cpu'"]),
        (
            {"world": "phantom", "attention": "flash_attention_2"},
            ["PyTorch's own attention kernels", "use attention 'sdpa_flash'"],
        ),
        ({"world": "cpu", "expandable_segments": True}, ["expandable_segments", "leave it out"]),
        (
            {"method": "layerwise", "attention": "sdpa_cudnn"},
            ["layerwise", "use sdpa, sdpa_flash, flash_attention_3 or"],
        ),
        (
            {
                "method": {"name": "ring", "cp": 2},
                "world_size": 2,
                "attention": "flash_attention_2",
            },
            ["ring", "use sdpa, sdpa_flash"],
        ),
        (
            {"method": "seq1f1b", "engine": "plain", "attention": "sdpa_cudnn"},
            ["seq1f1b", "use sdpa, sdpa_flash"],
        ),
        (
            {"method": "deepspeed_alst", "engine": "zero", "attention": "sdpa_flash"},
            ["deepspeed_alst", "use sdpa or flash_attention_2"],
        ),
        ({"attention": "flash_attention_9"}, ["attention", "flash_attention_9"]),
    ],
)
def test_cuda_settings_are_refused_in_other_worlds(
    change: dict[str, Any], words: list[str]
) -> None:
    """They are refused at load time, in one line."""
    with pytest.raises(ValueError, match=re.escape(words[0])) as raised:
        cell(**change)
    assert all(word in str(raised.value) for word in words), str(raised.value)
