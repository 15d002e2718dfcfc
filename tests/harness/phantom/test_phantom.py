"""Programs on phantom devices: memory is real, and unsupported functions are refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from loops import SCRIPTS, arguments, make_folder
from phantoms import NEEDED, NEEDS_TRITON, found_there

from harness.phantom.session import Result, run
from harness.phantom.wheel import peers

PROGRAMS = Path(__file__).with_name("programs")
ROOT = str(Path(__file__).parents[3])
GIB = 2**30
pytestmark = NEEDED


def phantom(
    program: str,
    surroundings: dict[str, str] | None = None,
    arguments: Sequence[str] = (),
    **options: Any,
) -> Result:
    """The result of a program in `programs`, with additional environment variables."""
    path = os.pathsep.join([ROOT, os.environ.get("PYTHONPATH", "")])
    base = {**os.environ, "PYTHONPATH": path, **(surroundings or {})}
    command = [sys.executable, str(PROGRAMS / f"{program}.py"), *arguments]
    return run(command, **{"hardware": "h100-80gb", "base": base, "limit_s": 120, **options})


def printed(program: str, **options: Any) -> tuple[Result, dict[str, Any]]:
    """The result of a program in `programs`, and its last output line, parsed as JSON."""
    with tempfile.TemporaryFile() as output:
        result = phantom(program, output=output.fileno(), **options)
        output.seek(0)
        text = output.read().decode()
    assert text, result.reason
    return result, json.loads(text.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def parts() -> tuple[Result, dict[str, Any]]:
    """The result of the program `parts`, and what it printed."""
    result, found = printed("parts", gpus=2)
    assert result.processes, result.reason
    return result, found


def test_known_values_read_back(parts: tuple[Result, dict[str, Any]]) -> None:
    """Copies and fills read back. Memory that a kernel may have written does not."""
    _, found = parts
    assert found["round trip"]
    assert found["clone"]
    assert found["fills"] == [[7, 7, 7], [1.5, 1.5, 1.5], [2.5, 2.5, 2.5], [True, True, True]]
    assert found["list"] == [[10, 11, 12], [20, 21, 22, 23, 24]]
    assert found["its source"] == 10
    assert found["list after a kernel"] == found["after a kernel"] == 0


def test_memory_is_charged_to_its_device(parts: tuple[Result, dict[str, Any]]) -> None:
    """Each device counts its own memory, also if another one is current. NVML reports the same."""
    _, found = parts
    assert found["allocated"] == [True, 300 * 2**20]
    assert found["used"][1] == 300 * 2**20
    assert found["used after"] == 0


def test_pinned_memory_is_rounded_by_pytorch(parts: tuple[Result, dict[str, Any]]) -> None:
    """Five million bytes take eight MiB, and views of them are pinned, too."""
    result, found = parts
    assert found["pinned"] == [True, True, False]
    assert found["pinned bytes"] >= 2**23
    assert result.processes[0].pinned_bytes >= 2**23


def test_streams_work_and_event_times_are_nan(parts: tuple[Result, dict[str, Any]]) -> None:
    """Streams and events are complete at once. Event times are NaN."""
    _, found = parts
    assert found["done"] == [True, True]
    assert found["event time"] == "nan"


def test_flash_attention_is_chosen(parts: tuple[Result, dict[str, Any]]) -> None:
    """cuDNN's attention is never chosen, because its host code is missing here."""
    result, _ = parts
    assert result.processes[0].attention == ["flash"]
    assert result.processes[0].refused == []


def test_expandable_segments_work(parts: tuple[Result, dict[str, Any]]) -> None:
    """Expandable segments are used if requested."""
    assert parts[1]["expandable"]


def test_the_sampler_reads_phantom_devices(parts: tuple[Result, dict[str, Any]]) -> None:
    """Another process reads this process's memory through NVML."""
    _, found = parts
    assert found["devices"] == ["NVIDIA H100 80GB HBM3"] * 2
    assert max(found["sampled"]) >= 1000 * 2**20


def test_out_of_memory_is_the_allocators() -> None:
    """A device of 79.1 GiB holds 79 tensors of one GiB, or fewer if other memory is in use. The
    report names the line.
    """
    result = phantom("full", outside_bytes=6 * GIB)
    assert (result.verdict, result.exit_code) == ("does not fit", 1)
    (process,) = result.processes
    assert process.oom is not None
    assert process.oom.where == "grow"
    assert process.oom.asked_bytes == GIB
    assert process.oom.alive[0].tensors == 73


def test_an_unknown_value_makes_no_record(tmp_path: Path) -> None:
    """The report names the reading line. A reviewed place gets its listed answer."""
    sites = tmp_path / "sites.yaml"
    sites.write_text("[{file: reads.py, function: reviewed, answer: 1.0, why: a test}]")
    result = phantom("reads", sites=sites)
    assert (result.verdict, result.exit_code) == ("no record", 2)
    (process,) = result.processes
    reads = [(read.line, read.bytes, read.answer, read.doubtful) for read in process.reads]
    assert reads == [(8, 4, 1.0, False), (13, 4, None, True)]
    assert 2**22 <= process.devices[0].allocated_bytes < 2**32


@pytest.mark.parametrize("hardware", ["rtx4090", "b300"])
def test_a_device_runs_code_of_an_older_one_of_its_generation(hardware: str) -> None:
    """PyTorch has no code for 8.9 and 10.3 alone. A scan chooses its tuning by the code that runs."""
    result = phantom("scan", hardware=hardware)
    assert result.verdict == "fits", result.reason


def test_unimplemented_functions_are_refused() -> None:
    """A program that goes on after a refusal gives no record. The message names the function."""
    result = phantom("refused")
    assert (result.verdict, result.exit_code) == ("no record", 2)
    assert "cufftCreate" in result.reason


@pytest.mark.parametrize(
    ("program", "rank"), [("sharded", 3), ("library", 3), ("deepspeed_zero", 0)]
)
def test_training_scripts_run_as_one_rank_of_eight(program: str, rank: int) -> None:
    """The scripts are unmodified. The check for packed sequences gets the answer for unpacked ones."""
    result = phantom(program, gpus=8, rank=rank)
    assert result.verdict == "fits", (result.reason, result.processes)
    (process,) = result.processes
    assert (process.rank, process.devices[0].device) == (rank, rank)
    # A mask of 8,192 x 8,192 would be the largest tensor.
    assert not any("mask" in held.where for held in process.devices[0].alive)


@pytest.mark.parametrize(
    "script",
    ["bare", "ddp", "fsdp2", "zero3", "accelerated", "trainer", "sft", "lora", "packed"],
)
def test_scripts_of_users_loops_run_as_one_rank_of_eight(script: str, tmp_path: Path) -> None:
    """Unmodified, with real text, two micro-batches a step."""
    argv = arguments(make_folder(tmp_path), tmp_path / "trained", sp=8, steps=2)
    command = [sys.executable, str(SCRIPTS / f"{script}.py"), *argv]
    result = run(command, "h100-80gb", gpus=8, rank=0, limit_s=120)
    assert result.verdict == "fits", (result.reason, result.processes)
    assert result.processes[0].devices[0].allocated_bytes > 0


def test_batches_that_come_from_the_device_are_sharded() -> None:
    """Their tokens are unknown, so whether the model has them is not looked at."""
    result = phantom("device_batch", gpus=8, rank=0)
    assert result.verdict == "fits", result.reason


LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.mark.parametrize(
    ("options", "ran"),
    [({}, [(0, 0, 2)]), ({"rank": 1}, [(1, 1, 2)]), ({"all_ranks": True}, [(0, 0, 1), (1, 1, 1)])],
)
def test_a_launcher_starts_one_rank_for_all_or_each(
    options: dict[str, Any], ran: list[tuple[int, int, int]]
) -> None:
    """Each rank runs on its own device, and holds the same."""
    command = [*LAUNCHER, str(PROGRAMS / "launched.py")]
    result = run(command, "h100-80gb", gpus=2, limit_s=120, **options)
    assert result.verdict == "fits", result.reason
    assert [(p.rank, p.devices[0].device, p.stands_for) for p in result.processes] == ran
    assert {p.devices[0].allocated_bytes for p in result.processes} == {4 * 2**20}


def test_a_launcher_of_another_number_of_ranks_is_refused(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The message says which number it is."""
    result = run([*LAUNCHER, str(PROGRAMS / "launched.py")], "h100-80gb", gpus=4, limit_s=120)
    assert result.exit_code == 2
    assert "the launcher starts 2 ranks; use --gpus 2, not 4" in capfd.readouterr().err


HOLLOW = {"PHANTOM_HOLLOW_HOST": "1"}


def test_large_tensors_on_the_host_cost_no_memory() -> None:
    """Includes a tensor larger than this machine's memory, pinned tensors and optimizer states.
    Small tensors and tokens keep values.
    """
    _, found = printed("hollow", surroundings=HOLLOW)
    assert found["grown"] < GIB
    assert found["bytes"] == [16 * GIB, 32 * GIB, 16 * GIB]
    assert found["pinned"] == [True, 16 * GIB]
    # Shard, master copy, gradient and two moments, each with some additional pages.
    assert 0 <= found["pageable"] - (16 + 4 * 32) * GIB < GIB
    assert found["moments"]
    assert found["view"]
    assert found["small"] == [0.5] * 3
    assert found["ids"]
    assert found["numbers"] == [[False, True, False], [5.0, 5.0]]


def test_the_trainer_of_transformers_runs_as_one_rank_of_four() -> None:
    """It runs with DeepSpeed's sequence parallelism and ZeRO-3. Logged and printed values do not
    decide control flow.
    """
    program = [sys.executable, str(PROGRAMS / "trainer.py"), "8192", "1"]
    result = run(program, "h100-80gb", gpus=4, rank=0, limit_s=300, hollow_host=True)
    assert result.verdict == "fits", (result.reason, result.processes)
    (process,) = result.processes
    # Logits and their gradient in fp32, for a quarter of the sequence.
    assert process.devices[0].allocated_bytes > 2 * 8192 // 4 * 151_936 * 4
    assert "flash" in process.attention


@NEEDS_TRITON
@pytest.mark.parametrize(
    "limit",
    [
        {"window": 290, "pattern": None},
        {
            "window": None,
            "pattern": {
                "name": "block_sparse",
                "block": 48,
                "window_blocks": 2,
                "random_blocks": 2,
            },
        },
    ],
    ids=["window", "pattern"],
)
def test_the_code_of_core_flex_computes_attention(tmp_path: Path, limit: dict[str, Any]) -> None:
    """The code that PyTorch makes for the device, run by Triton's interpreter, has the output and gradients of
    core `sdpa`, where blocks are seen whole, in part and not at all, and the last one is short. That tells
    nothing of what a GPU's compiler makes of it.
    """
    documents = [[440, 9, 1]]
    case = {"seqlen": 450, "documents": documents, "softcap": 3.0, **limit}
    arguments = [str(tmp_path), json.dumps(case)]
    result = phantom("flex_code", arguments=arguments, limit_s=400)
    assert result.verdict == "fits", (result.reason, result.processes)
    path = os.pathsep.join([ROOT, os.environ.get("PYTHONPATH", ""), str(peers())])
    done = subprocess.run(
        [sys.executable, str(PROGRAMS / "flex_values.py"), *arguments],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        check=True,
    )
    errors = json.loads(done.stdout)
    assert len(errors) == 5
    assert max(errors) < 2e-6


NEEDS_PEERS = pytest.mark.skipif(
    not all(map(found_there, ("arctic_training", "liger_kernel", "triton"))),
    reason="needs the extra peers",
)


@NEEDS_PEERS
@pytest.mark.parametrize(("program", "least"), [("liger", 2 * GIB), ("compiled", GIB // 8)])
def test_compiled_kernels_are_launched(program: str, least: int) -> None:
    """Triton kernels, written by hand and made by TorchInductor, are compiled and launched, and compute nothing."""
    result = phantom(program)
    assert result.verdict == "fits", (result.reason, result.processes)
    (process,) = (each for each in result.processes if each.devices)  # compilers use none
    assert process.devices[0].allocated_bytes > least


@NEEDS_TRITON
def test_core_flex_keeps_no_scores() -> None:
    """Forward and backward of layers with windows, sinks and soft-caps run in PyTorch's compiled kernel. They take a
    few times the query's bytes, whatever a query sees, where tiles take their scores, too.
    """
    result, found = printed("flex", limit_s=400)
    assert result.verdict == "fits", (result.reason, result.processes)
    (process,) = (each for each in result.processes if each.devices)
    assert "flex" in process.attention
    for model in ("gpt-oss", "gemma2"):
        window, full = (found[f"{model} {name} flex"] for name in ("window", "full"))
        assert window == full
        assert full["held"] < 2_150  # the output, and the one without sinks
        assert full["forward"] < 2_150
        assert full["backward"] < 3_500
        for each in ("forward", "backward"):
            assert full[each] < found[f"{model} full sdpa"][each]
    assert found["gemma2 full flex"]["held"] < 1_050
    assert found["gemma2 full sdpa"]["backward"] > 20_000


@NEEDS_PEERS
def test_the_released_stack_runs() -> None:
    """The stack is DeepSpeed with parameters and optimizer on the host, Liger, TiledMLP and
    ArcticTraining's checkpoint offload.
    """
    result, found = printed("released", gpus=8, rank=0, surroundings=HOLLOW)
    assert result.verdict == "fits", (result.reason, result.processes)
    layer_input = found["local"] * 5_120 * 2
    assert found["offloaded"] == [2 * layer_input, layer_input, layer_input]
    assert found["tiles"] == 2 * 2 * 2  # two tiles in each of two layers, computed twice
    for kernel in ("_rms_norm_forward", "_triton_rope", "liger_cross_entropy"):
        assert any(kernel in name for name in found["kernels"]), kernel
    assert not any("swiglu" in name for name in found["kernels"])
