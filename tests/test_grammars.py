"""What a user may write, whatever it is: a value, or one line that refuses it. No other error, and no silence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from alst_impl.config import TOO_LONG, tokens
from alst_impl.models import published
from alst_impl.models.stored import check_weights
from harness.cells.experiment import read_experiment
from harness.cells.hardware import load_hardware, row_name
from harness.cells.paths import experiment
from harness.cells.units import BYTES, bytes_value, length_text
from harness.cells.yamls import read_yaml
from harness.commands.options import core_spec, parsed, share
from harness.commands.request import _documents, _lora
from harness.records import record

settings.register_profile("here", deadline=None, derandomize=True, max_examples=80)
settings.load_profile("here")
FILES = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
"""The folder is the same for all examples, each of which writes its own file anew."""
NUMBERS = st.from_regex(r"-?[0-9_,.]{0,8}[KkMmGTi]{0,2}B?(/s)?%?", fullmatch=True)
"""Text that looks like a number with a unit."""
TEXTS = st.one_of(NUMBERS, st.text(max_size=30))


def refusal(read: Callable[[Any], Any], given: Any) -> str | None:
    """The words with which `read` refuses what it is given; None if it takes it."""
    try:
        read(given)
    except (ValueError, typer.BadParameter) as error:
        return str(error)
    return None


READERS: dict[str, Callable[[str], Any]] = {
    "a length": tokens,
    "a size": bytes_value,
    "a share": share,
    "documents": _documents,
    "adapters": _lora,
    "options": lambda text: parsed([text]),
    "a pattern": lambda text: core_spec("flex", text),
    "hardware": row_name,
    "an experiment's name": experiment,
}


@pytest.mark.parametrize("reader", READERS)
@given(text=TEXTS)
@example(text="1" * 5_000)
@example(text="a=" + "[" * 1_000)
@example(text="a=2024-13-45")
@example(text="9e999")
def test_any_text_is_read_or_refused(reader: str, text: str) -> None:
    """In words."""
    assert refusal(READERS[reader], text) != ""


@given(count=st.integers(1, TOO_LONG - 1))
def test_a_length_is_read_as_it_is_printed(count: int) -> None:
    """With any of its separators, and with none."""
    assert tokens(length_text(count)) == tokens(f"{count:_}") == tokens(str(count)) == count


@given(
    count=st.integers(1, 2**20),
    unit=st.sampled_from(sorted(BYTES)),
    space=st.sampled_from(["", " "]),
)
def test_a_size_is_its_number_of_units(count: int, unit: str, space: str) -> None:
    """Decimal and binary units are told apart."""
    assert bytes_value(f"{count}{space}{unit}") == count * BYTES[unit]


@given(
    value=st.one_of(st.booleans(), st.integers(), st.text(max_size=9), st.lists(st.integers())),
    key=st.from_regex(r"[a-z_]{1,9}", fullmatch=True),
)
def test_an_option_is_its_yaml(key: str, value: Any) -> None:
    """Whatever the value is, as long as it is on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("...\n")
    assert parsed([f"{key}={text}"]) == {key: value}


FROM_FILE: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "YAML": ("any.yaml", read_yaml),
    "an experiment": ("any.yaml", read_experiment),
    "hardware": ("any.yaml", lambda path: load_hardware(str(path))),
    "a configuration": ("any.json", lambda path: published(str(path))),
    "a record": ("any.json", record.read),
    "weights": ("model.safetensors", lambda path: check_weights(path.parent)),
    "an index of weights": (
        "model.safetensors.index.json",
        lambda path: check_weights(path.parent),
    ),
}


@pytest.mark.parametrize("reader", FROM_FILE)
@FILES
@given(content=st.one_of(st.binary(max_size=60), TEXTS.map(str.encode)))
@example(content=b"{" * 1_000)
@example(content=b"[" * 1_000)
@example(content=b"- " * 1_000)
@example(content=b"a: 2024-13-45")
@example(content=b'{"model_type": "llama", "num_attention_heads": 1e400}')
@example(content=b"\x02\0\0\0\0\0\0\0{}")
def test_any_file_is_read_or_refused_by_name(reader: str, content: bytes, tmp_path: Path) -> None:
    """In words that begin with its path."""
    name, read = FROM_FILE[reader]
    path = tmp_path / name
    path.write_bytes(content)
    said = refusal(read, path)
    assert said is None or name in said
