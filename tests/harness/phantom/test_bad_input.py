"""Wrong user input and missing software: each gives one clear line."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

import pytest

from harness.phantom import build, load, session, wheel
from harness.phantom.wheel import Wheel

WHEEL = Wheel(folder=Path("nowhere"), version="2.13.0+cu130", cuda="13.0")


def test_unknown_hardware_names_the_rows() -> None:
    """The message is the one of all commands."""
    with pytest.raises(ValueError, match=r"unknown hardware 'h101'; use .*h100"):
        load.device_of("h101", 1, 0)


def test_hardware_without_cuda_is_refused() -> None:
    """The message names the rows with CUDA devices."""
    with pytest.raises(ValueError, match="'cpu' has no CUDA devices; use one of a100-40gb"):
        load.device_of("cpu", 1, 0)


@pytest.mark.parametrize(("gpus", "outside"), [(0, 0), (65, 0), (1, 80 * 2**30), (1, -1)])
def test_numbers_out_of_range_are_refused(gpus: int, outside: int) -> None:
    """Numbers of devices, and bytes outside the allocator."""
    with pytest.raises(ValueError, match=r"--gpus|outside the allocator"):
        load.device_of("h100-80gb", gpus, outside)


def test_a_rank_beyond_the_others_is_refused() -> None:
    """The message names the existing ranks."""
    with pytest.raises(ValueError, match="with --gpus 4 ranks are 0 to 3"):
        session.rank_environment(4, 4, 8)


def test_a_rank_of_another_node_has_its_local_number() -> None:
    """Rank 19 of 32 is the fourth of the third node of eight."""
    told = session.rank_environment(19, 32, 8)
    assert (told["LOCAL_RANK"], told["GROUP_RANK"], told["LOCAL_WORLD_SIZE"]) == ("3", "2", "8")


def test_no_cuda_build_says_how_to_get_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the folder nor the environment has one."""
    monkeypatch.setenv("ALST_PHANTOM", str(tmp_path))
    monkeypatch.setattr(wheel, "environment_folder", lambda: None)
    with pytest.raises(ValueError, match=r"no CUDA build of PyTorch .*fetch one"):
        wheel.find()


def test_another_platform_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names the supported platforms."""
    monkeypatch.setattr("sys.platform", "darwin")
    with pytest.raises(ValueError, match="need Linux on x86_64 or aarch64, this is darwin"):
        wheel.find()


def test_no_compiler_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names the package that has a compiler."""
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ValueError, match="pip install ziglang"):
        build.compiler()


def test_concurrent_builds_build_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second waits for the first and uses its result. A partial build is deleted."""
    builds = []

    def compile_all(wheel: Wheel, folder: Path) -> None:
        folder.mkdir()
        builds.append(folder)
        time.sleep(0.2)
        (folder / build.DONE).write_text("libphantom.so\n")

    monkeypatch.setenv("ALST_PHANTOM", str(tmp_path))
    monkeypatch.setattr(build, "compile_all", compile_all)
    half = tmp_path / "cache" / build.cache_key(WHEEL)
    half.mkdir(parents=True)
    (half / "libcudart.so.13").touch()
    threads = [threading.Thread(target=build.built, args=(WHEEL,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == 1
    assert [path.name for path in half.iterdir()] == [build.DONE]


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names the full folder."""

    def compile_all(wheel: Wheel, folder: Path) -> None:
        folder.mkdir()
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("ALST_PHANTOM", str(tmp_path))
    monkeypatch.setattr(build, "compile_all", compile_all)
    with pytest.raises(ValueError, match=r"cannot build phantom libraries in .*: No space left"):
        build.built(WHEEL)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["lock"]


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (["sleep", "60"], "not done after 0 s"),
        (["false"], "ended with exit code 1"),
        (["sh", "-c", "kill -9 $$"], "was ended by signal 9"),
        (["true"], "used no CUDA device"),
    ],
)
def test_a_command_without_a_report_cannot_be_judged(
    command: list[str], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command that never stops, fails, dies, or uses no device gives exit code 2."""
    monkeypatch.setattr(session, "environment", lambda *given: dict(given[-1]))
    result = session.run(command, "h100-80gb", limit_s=0.4 if "60" in command else 20)
    assert reason in result.reason
    assert result.exit_code == 2


def test_a_command_that_does_not_exist_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error comes before anything is started."""
    monkeypatch.setattr(session, "environment", lambda *given: dict(given[-1]))
    with pytest.raises(ValueError, match="command 'no-such-command' does not exist"):
        session.run(["no-such-command"], "h100-80gb")


GREEDY = """
import os, time
if "PHANTOM_HOLLOW_HOST" not in os.environ:
    taken = b"1" * 2**28
    time.sleep(60)
"""


def test_a_command_that_needs_much_memory_starts_again_without_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is stopped once it has taken what it may, unless the memory is asked for."""
    monkeypatch.setattr(session, "environment", lambda *given: dict(given[-1]))
    monkeypatch.setattr(session, "spare_bytes", lambda: 2**27)
    command = [sys.executable, "-c", GREEDY]
    result = session.run(command, "h100-80gb", limit_s=20)
    assert result.hollow_host
    assert "used no CUDA device" in result.reason
    assert "GiB of this machine's memory; once more with --hollow-host" in capsys.readouterr().err
    assert "not done" in session.run(command, "h100-80gb", limit_s=2, hollow_host=False).reason
