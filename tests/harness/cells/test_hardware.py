"""Hardware rows."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from harness.cells.hardware import FOLDER, ROWS, load_hardware, row_name
from harness.commands import lists

PUBLISHED = Path(__file__).parents[3] / "experiments/published"


def test_rows_are_found_by_name() -> None:
    """The rows that experiments use exist, each with its source."""
    assert set(ROWS) >= {"cpu", "a100-80gb", "h100-80gb", "h200-141gb", "b200-192gb"}
    assert all(row.name == name and row.source for name, row in ROWS.items())


@pytest.mark.parametrize("name", sorted(set(ROWS) - {"cpu"}))
def test_a_row_names_a_document_of_the_vendor(name: str) -> None:
    """By title. All speeds are there, and what joins the GPUs is named."""
    row = ROWS[name]
    assert row.source.startswith("NVIDIA ")
    assert any(word in row.source for word in ("datasheet", "Architecture", "product brief"))
    assert row.bf16_flops
    assert row.memory_bandwidth
    assert row.link


def test_cards_without_nvlink_are_not_as_fast_as_with_it() -> None:
    """A node's bandwidth is that of PCIe, 4.0 or 5.0, exactly where PCIe joins it."""
    for row in ROWS.values():
        if row.link:
            over_pcie = row.intra_node_bandwidth in (32e9, 64e9)
            assert over_pcie == (row.link == "PCIe"), row.name


def test_a_device_has_one_row() -> None:
    """The SXM and the PCIe card of an A100 have rows of their own."""
    names = [device for row in ROWS.values() for device in row.device_names]
    assert len(names) == len(set(names))
    rows = {device: row.link for row in ROWS.values() for device in row.device_names}
    assert rows["NVIDIA A100-SXM4-40GB"] == "NVLink"
    assert rows["NVIDIA A100-PCIE-40GB"] == "PCIe"


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("H100", "h100-80gb"),
        ("h100 80GB", "h100-80gb"),
        ("RTX_4090", "rtx4090"),
        ("rtx-5090", "rtx5090"),
        ("4090", "rtx4090"),
        ("A100", "a100-80gb"),
        ("b200", "b200-192gb"),
    ],
)
def test_small_spelling_is_forgiven(written: str, name: str) -> None:
    """Case, spaces, hyphens and aliases."""
    assert row_name(written) == name


def test_a_row_is_printed_as_a_file_to_start_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What `alst hardware h200` prints is hardware of one's own."""
    lists.hardware("h200")
    path = tmp_path / "mine.yaml"
    path.write_text(capsys.readouterr().out)
    assert load_hardware(str(path)) == ROWS["h200-141gb"]


def test_a_row_is_not_below_published_readings_of_it() -> None:
    """NVML read 134.96 GiB of an H200 in use."""
    with (PUBLISHED / "alst_h200_recipes.csv").open() as file:
        readings = {(row["gpu"], float(row["noted_gpu_memory_gb"])) for row in csv.DictReader(file)}
    assert readings
    for name, gib in readings:
        assert load_hardware(name).usable_bytes >= gib * 2**30


def test_own_row_comes_from_a_file(tmp_path: Path) -> None:
    """A user's row can be a YAML file."""
    path = tmp_path / "mine.yaml"
    path.write_text(
        "{name: mine, memory_bytes: 40GB, host_memory_bytes: 1.9TB, intra_node_bandwidth: 25GB/s, devices_per_node: 2, "
        "source: me}"
    )
    row = load_hardware(str(path))
    assert (row.memory_bytes, row.usable_bytes) == (40 * 10**9, 40 * 10**9)
    assert (row.host_memory_bytes, row.intra_node_bandwidth) == (1_900 * 10**9, 25e9)


@pytest.mark.parametrize("text", ["{name: mine}", "- 1", "{name: ["])
def test_bad_row_names_the_file(tmp_path: Path, text: str) -> None:
    """A malformed row fails with its file."""
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"mine\.yaml"):
        load_hardware(str(path))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("bf16_flops: 989.4TFLOPS", "bf16_flops: 450GB/s", "is not a speed of arithmetic"),
        ("memory_bandwidth: 3350GB/s", "memory_bandwidth: 3350GB", "is not a bandwidth in bytes"),
        ("memory_bytes: 80GiB", "memory_bytes: 80GB", r"usable_bytes \(79.1 GiB\) are more than"),
        ("link: NVLink", "link: string", "link = 'string'"),
        ("link: NVLink", "links: NVLink", "links = 'NVLink'"),
    ],
)
def test_a_wrong_value_is_named(tmp_path: Path, old: str, new: str, words: str) -> None:
    """A value of another kind, more usable memory than memory, and an unknown key."""
    text = (FOLDER / "h100-80gb.yaml").read_text()
    assert old in text
    path = tmp_path / "mine.yaml"
    path.write_text(text.replace(old, new))
    with pytest.raises(ValueError, match=words):
        load_hardware(str(path))
