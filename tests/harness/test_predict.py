"""Predictions, the search for the longest sequence, and their command line."""

from __future__ import annotations

import json
import re
import sys
import threading
from pathlib import Path
from typing import Any, get_args

import pytest
from phantoms import NEEDED, cell, estimated, measured, predicted

from alst_impl.models import published
from harness import __main__ as command_line
from harness.cells.cell import Cell
from harness.cells.hardware import Hardware, load_hardware
from harness.cells.prediction import LIMITS, Limit, SearchResult
from harness.commands import predict
from harness.commands.request import Request
from harness.devices.outside import OUTSIDE_READINGS

pytestmark = NEEDED
GIB, MIB = 2**30, 2**20
OUTSIDE_BYTES = int(sum(a - b for a, b in OUTSIDE_READINGS.values()) / len(OUTSIDE_READINGS) * GIB)
"""Memory outside the allocator of one of several ranks."""
PREDICTED = [
    "allocated_bytes",
    "reserved_bytes",
    "overhead_bytes",
    "total_bytes",
    "host_bytes",
    "bytes_per_local_token",
    "by_category",
    "fits",
    "limit",
    "flops",
    "step_seconds_modelled",
    "time",
    "time_unknown",
    "cost",
    "least_seconds_modelled",
]


def small(room: int, host: int = GIB) -> Hardware:
    """An H100 with about `room` bytes for the allocator, in a node of 8 with `host` bytes."""
    h100 = load_hardware("h100-80gb")
    assert h100.chip is not None
    return h100.model_copy(
        update={
            "name": "small",
            "host_memory_bytes": host,
            "chip": h100.chip.model_copy(update={"usable_bytes": OUTSIDE_BYTES + room}),
            "source": "made up",
        }
    )


def written(folder: Path, hardware: Hardware) -> str:
    """A file with the row `hardware`."""
    path = folder / "mine.yaml"
    path.write_text(hardware.model_dump_json())
    return str(path)


def of(hardware: str = "h100-80gb", seqlen: int = 4_096, gpus: int = 2, **settings: Any) -> Cell:
    """A cell with tiny-llama on `gpus` GPUs, with states in host memory."""
    return cell(
        **{
            "method": {"name": "alst", "sp": gpus},
            "engine": {"name": "fsdp2", "offload": True},
            "hardware": hardware,
            "seqlen": seqlen,
            "world_size": gpus,
            **settings,
        }
    )


def longest(asked: Cell) -> SearchResult:
    """The search result of a cell."""
    simulated = measured(asked).simulated
    assert simulated is not None
    assert simulated.search is not None
    return simulated.search


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int | None:
    """Exit code of `alst ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", ["alst", *arguments])
    with pytest.raises(SystemExit) as ended:
        command_line.main()
    code = ended.value.code
    assert code is None or isinstance(code, int)
    return code


# -- predictions ------------------------------------------------------------------------------------


def test_the_numbers_add_up() -> None:
    """Categories sum to allocated bytes up to block rounding. Allocated and overhead sum to the total."""
    p = predicted(of())
    assert 0.99 * p.allocated_bytes <= sum(p.by_category.values()) <= p.allocated_bytes
    assert p.allocated_bytes + p.overhead_bytes == p.total_bytes
    assert p.bytes_per_local_token is not None
    assert p.bytes_per_local_token > 0


def test_few_layers_give_the_bytes_per_token() -> None:
    """For 8 layers, the slope from runs with two and four layers equals the slope from full runs."""
    deep = {"overrides": {"num_hidden_layers": 8}, "seqlen": 4_096}
    slope = predicted(of(**deep)).bytes_per_local_token
    near, far = (predicted(of(**{**deep, "seqlen": n})).allocated_bytes for n in (4_096, 4_176))
    assert slope is not None
    assert slope == pytest.approx((far - near) / (80 / 2), abs=0.01)


def test_search_ends_on_the_limit(tmp_path: Path) -> None:
    """The longest length fits, the shortest failing one does not, and search and prediction name the same limit."""
    wide = {
        "model": "llama3.1-8b",
        "overrides": {"num_hidden_layers": 1, "vocab_size": 4_096},
    }
    hardware = written(tmp_path, small(20 * GIB, host=5 * GIB))
    found = longest(of(hardware, seqlen=50_000, simulation={"search": True}, **wide))
    assert 0 < found.longest_tokens < found.shortest_failing_tokens
    gap = found.shortest_failing_tokens - found.longest_tokens
    assert gap <= max(0.015 * found.shortest_failing_tokens, 2 * 256)
    assert predicted(of(hardware, found.longest_tokens, **wide)).fits
    failing = predicted(of(hardware, found.shortest_failing_tokens, **wide))
    assert failing.limit == found.limit == "host_memory"


def test_nothing_fits(tmp_path: Path) -> None:
    """If parameters do not fit, the longest sequence is 0 tokens."""
    hardware = written(tmp_path, small(4 * MIB))
    found = longest(of(hardware, simulation={"search": True}))
    assert (found.longest_tokens, found.limit) == (0, "gpu_memory")


def test_heads_bound_the_ranks_of_a_sample(tmp_path: Path) -> None:
    """The limit is `heads` only if heads keep more ranks from sharing a sample. A smaller sp is a
    choice, and a ring does not split heads.
    """
    heads = published("tiny-llama")["num_attention_heads"]
    hardware = written(tmp_path, small(4 * MIB))
    for method, limit in (
        ({"name": "alst", "sp": heads}, "heads"),
        ({"name": "alst", "sp": 1}, "gpu_memory"),
        ({"name": "usp", "cp": 2, "sp": heads}, "gpu_memory"),
    ):
        assert predicted(of(hardware, gpus=2 * heads, method=method)).limit == limit


def test_pinned_checkpoints_take_powers_of_two() -> None:
    """Host memory counts the pinned allocator's rounding. Only token ids grow beside it with length."""
    near, far = (predicted(of(seqlen=n, gpus=1)).host_bytes for n in (6_000, 40_000))
    layers, hidden = (published("tiny-llama")[k] for k in ("num_hidden_layers", "hidden_size"))
    short, long = (1 << (n * hidden * 2 - 1).bit_length() for n in (6_000, 40_000))
    ids = 3 * 8 * 34_000
    assert 0 <= far - near - layers * (long - short) <= 2 * ids


# -- command line -----------------------------------------------------------------------------------


def test_predict_prints_the_agreed_keys(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prints one JSON object. `--explain` adds the allocations at the peak, with function, bytes and line."""
    arguments = ["predict", "tiny-llama", "--gpus", "2", "--seqlen", "4_096", "--json", "--explain"]
    assert not run(monkeypatch, *arguments)
    answer = json.loads(capsys.readouterr().out)
    alive = answer.pop("alive_at_peak")
    assert answer.pop("asked")["hardware"] == "h100-80gb"
    assert answer.pop("versions").keys() == {"alst-bench", "torch", "transformers"}
    assert list(answer) == PREDICTED
    assert list(answer["flops"]) == ["paper_formula", "model_causal"]
    assert answer["limit"] in get_args(Limit)
    assert sum(row["nbytes"] for row in alive) == pytest.approx(answer["allocated_bytes"], rel=0.01)
    assert {"category", "operator", "location", "nbytes", "count"} == alive[0].keys()
    assert any((row["location"] or "").startswith("alst_impl/ops/") for row in alive)


def test_predict_reads_well(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prints bytes by category, host bytes, the verdict with its limit, both FLOPs and the time."""
    arguments = [
        "predict",
        "tiny-llama",
        "--gpus",
        "16",
        "--seqlen",
        "4096",
        "--host-memory",
        "1KB",
        "--explain",
    ]
    assert not run(monkeypatch, *arguments)
    text = capsys.readouterr().out
    for words in (
        "sp 8",
        "activations",
        "by PyTorch's allocator",
        "outside the allocator",
        "host memory",
        "of 79.1 GiB, 5.0% left free",
        "of 1000 B",
        "does not fit",
        "(host_memory)",
        "paper's formula",
        "causal",
        "(modelled)",
        "alive at the peak",
        "alst_impl/ops/",
    ):
        assert words in text


def test_search_prints_the_agreed_keys(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Prints one JSON object. The hardware is a user's row."""
    hardware = written(tmp_path, small(10 * GIB, host=10**13))
    model = tmp_path / "wide.json"
    fields = {**published("llama3.1-8b"), "num_hidden_layers": 1, "vocab_size": 4_096}
    model.write_text(json.dumps(fields))
    arguments = ["--gpus", "2", "--hardware", hardware, "--margin", "0", "--json"]
    assert not run(monkeypatch, "search", str(model), *arguments)
    answer = json.loads(capsys.readouterr().out)
    assert answer.pop("asked")["train"]["world_size"] == 2
    assert answer.pop("versions")["torch"]
    assert list(answer) == [
        "longest_tokens",
        "shortest_failing_tokens",
        "limit",
        "evaluations",
    ]
    assert answer["limit"] == "gpu_memory"
    assert predicted(of(hardware, answer["longest_tokens"], model=str(model))).fits
    assert (
        predicted(of(hardware, answer["shortest_failing_tokens"], model=str(model))).limit
        == "gpu_memory"
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("no-such --seqlen 64", ["no-such", "llama3.1-8b"]),
        ("tiny-llama --seqlen 0", ["--seqlen", "0"]),
        ("tiny-llama --seqlen 1.5", ["--seqlen", "1.5"]),
        ("tiny-llama --seqlen many", ["--seqlen", "many", "128K"]),
        ("tiny-llama --seqlen 1,5K", ["--seqlen", "1,5K"]),
        (f"tiny-llama --seqlen {'9' * 400}", ["--seqlen", "not a length"]),
        (f"tiny-llama --seqlen 64 --host-memory {'9' * 400}", ["not a size"]),
        (f"tiny-llama --seqlen 64 --documents 4K,{'9' * 400}", ["--documents", "such as 4K"]),
        ("tiny-llama --seqlen 64 --margin 95%", ["--margin", "95%", "such as 0.05 or 5%"]),
        ("./tiny-llama --seqlen 64", ["unknown model './tiny-llama'", "use tiny-llama"]),
        ("tiny-lama --seqlen 64", ["tiny-lama", "use tiny-llama"]),
        ("tiny-llama --seqlen 1_000_000_000_000", ["one hidden state", "shorter sequence"]),
        ("tiny-llama --seqlen 64 --hardware mi300x", ["mi300x", "ROCm"]),
        ("tiny-llama --seqlen 64 --hardware h10", ["h10", "use h100"]),
        ("tiny-llama --seqlen 64 --documents 65", ["65 documents", "64 tokens", "(65,)"]),
        ("tiny-llama --seqlen 64 --documents 0", ["--documents 0", "such as 16"]),
        ("tiny-llama --seqlen 64 --lora many", ["--lora many", "such as 16"]),
        ("tiny-llama --seqlen 64 --kernel magic", ["magic", "sdpa"]),
        (
            "tiny-llama --seqlen 64 --method layerwise --kernel sdpa_cudnn",
            ["'sdpa_cudnn'", "flash_attention_3"],
        ),
        ("tiny-llama --seqlen 64 --pattern window:window=0", ["window = 0", "equal to 1"]),
        ("tiny-llama --seqlen 64 --pattern window:4", ["--pattern 4", "key=value"]),
        ("tiny-llama --seqlen 64 --pattern window:window=8", ["window=8", "use attention 'flex'"]),
        (
            "tiny-llama --seqlen 64 --kernel flex --pattern window:window=8,global_tokens=64",
            ["global_tokens (64)", "seqlen (64)", "up to 63"],
        ),
        (
            "tiny-llama --seqlen 64 --kernel sdpa_flash --pattern window:window=8",
            ["window (window=8)", "use attention 'sdpa' or 'flex'"],
        ),
        ("tiny-llama --seqlen 64 --engine plain", ["plain", "--states gpu"]),
        ("tiny-llama --seqlen 64 --engine magic", ["unknown engine 'magic'", "fsdp2"]),
        ("tiny-llama --seqlen 64 --host-memory 256", ["'256' is not a size", "GiB"]),
        (
            "tiny-llama --seqlen 64 --lora 16:q_proj,v_prj",
            ["no 'v_prj'", "q_proj, up_proj, v_proj"],
        ),
        ("tiny-llama --seqlen 64 --margin 2", ["--margin", "2"]),
        ("tiny-llama", ["--seqlen"]),
        ("tiny-llama --seqlen 64 --gpus 3 --option sp=3", ["sp (3)", "use sp in [1, 2, 4, 8]"]),
        ("tiny-llama --seqlen 64 --hardware abacus", ["abacus", "h100-80gb"]),
        ("tiny-llama --seqlen 64 --hardware no.yaml", ["no.yaml", "no such file"]),
        ("tiny-llama --seqlen 64 --hardware {broken}.yaml", ["YAML"]),
        ("tiny-llama --seqlen 64 --hardware {listed}.yaml", ["YAML mapping"]),
        ("tiny-llama --seqlen 64 --host-memory much", ["much", "TiB"]),
        ("tiny-llama --seqlen 64 --option tile_mlp", ["key=value"]),
        ("tiny-llama --seqlen 64 --method magic", ["magic", "alst"]),
        ("tiny-llama --seqlen 64 --method usp --option cp=0", ["cp=0", "1 or more"]),
        ("tiny-llama --seqlen 64 --method usp --option cp=null", ["cp=None", "1 or more"]),
        ("{broken}.json --seqlen 64", ["model_type"]),
        ("{unknown}.json --seqlen 64", ["no-such-type"]),
        ("{wrong}.json --seqlen 64", ["hidden_size", "many"]),
    ],
)
def test_bad_input_is_one_line(
    arguments: str,
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Impossible input gives exit code 2 and one helpful line on stderr, and nothing is written."""
    llama = published("tiny-llama")
    files = {
        "broken.yaml": "name: [",
        "listed.yaml": "- 1",
        "broken.json": "{",
        "unknown.json": json.dumps({**llama, "model_type": "no-such-type"}),
        "wrong.json": json.dumps({**llama, "hidden_size": "many"}),
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    paths = {name.partition(".")[0]: tmp_path / name.partition(".")[0] for name in files}
    assert run(monkeypatch, "predict", *arguments.format(**paths).split()) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert all(word in line for word in words), line
    assert {path.name for path in tmp_path.iterdir()} == files.keys()


def test_lengths_and_names_as_people_write_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """4K is 4,096 tokens, 5% is 0.05, and case, an organisation and an alias are forgiven."""
    arguments = ["predict", "Some/Tiny_LLAMA", "--seqlen", "4K", "--hardware", "H100", "--json"]
    assert not run(monkeypatch, *arguments, "--margin", "5%", "--documents", "1K,3K")
    asked = json.loads(capsys.readouterr().out)["asked"]
    assert asked["train"]["seqlen"] == 4_096
    assert asked["train"]["model"] == "tiny-llama"
    assert asked["train"]["data"]["documents"] == [1_024, 3_072]
    assert asked["hardware"] == "h100-80gb"
    assert asked["simulation"]["margin"] == 0.05


@pytest.mark.parametrize(
    ("text", "documents"), [("16", 16), ("4K", (4_096,)), ("4K,", (4_096,)), ("1000,", (1_000,))]
)
def test_a_length_of_documents_is_not_their_number(text: str, documents: Any) -> None:
    """4K is a length, with or without a comma: nobody packs 4,096 documents by that word."""
    asked = Request(model="tiny-llama", documents=text).cell(16_384, 1, "alst", {})
    assert asked.train.data.documents == documents


def test_packed_documents_take_less_time() -> None:
    """Attention of eight documents has an eighth of the pairs; the same holds for what training needs."""
    whole, packed = estimated(of(seqlen=16_384), of(seqlen=16_384, data={"documents": [2_048]}))
    assert whole.cost is not None
    assert packed.cost is not None
    assert packed.cost.attention_flops == pytest.approx(whole.cost.attention_flops / 8, rel=0.01)
    assert whole.time is not None
    assert packed.time is not None
    part = "attention"
    assert packed.time.parts[part] == pytest.approx(whole.time.parts[part] / 8, rel=0.01)
    assert packed.flops.model_causal < whole.flops.model_causal


def test_a_margin_is_left_free(tmp_path: Path) -> None:
    """A step that takes all of a device fits without a margin only."""
    held = predicted(of()).reserved_bytes
    assert held is not None
    hardware = written(tmp_path, small(held + MIB))
    assert predicted(of(hardware)).fits
    with_margin = {"search": False, "margin": 0.05}
    assert not predicted(of(hardware, simulation=with_margin)).fits


def test_nothing_fits_where_a_margin_leaves_nothing(tmp_path: Path) -> None:
    """What lies outside the allocator is more than the rest: the limit is named, and no length fits."""
    hardware = written(tmp_path, small(GIB))
    assert predicted(of(hardware)).fits
    found = predicted(of(hardware, simulation={"search": False, "margin": 0.5}))
    assert (found.fits, found.limit) == (False, "gpu_memory")
    result = longest(of(hardware, simulation={"search": True, "margin": 0.5}))
    assert (result.longest_tokens, result.limit) == (0, "gpu_memory")


def test_adapters_need_less_work_and_no_host_update_of_frozen_weights() -> None:
    """LoRA saves the weight gradients, and the host updates the adapters alone."""
    whole, adapters = estimated(of(), of(lora={"rank": 4}))
    assert adapters.flops.model_causal < whole.flops.model_causal
    assert whole.time is not None
    assert adapters.time is not None
    part = "update on the host"
    assert adapters.time.parts[part] < 0.5 * whole.time.parts[part]


FAMILIES: dict[str, dict[str, Any]] = {
    "phi3": {"pad_token_id": 0},
    "qwen2": {},
    "olmo2": {},
    "granite": {},
    "starcoder2": {},
    "gemma2": {"head_dim": 32},
    "falcon": {},
    "opt": {"word_embed_proj_dim": 256, "ffn_dim": 512},
    "gpt2": {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "mistral": {"sliding_window": 256},
    "mixtral": {"num_local_experts": 4},
    "deepseek_v3": {
        "num_key_value_heads": 8,
        "kv_lora_rank": 32,
        "q_lora_rank": 64,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "n_routed_experts": 8,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 128,
    },
}
"""Model types without a file in this repository -> fields besides `SIZES`."""
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "whisper": ({}, "computes its loss by itself"),
    "mbart": ({}, "would count positions from the start of each shard"),
    "gemma3n_text": ({"num_kv_shared_layers": 1}, "layers that use other layers' keys and values"),
}
"""Model types that cannot be predicted -> the structure that prevents it."""
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 1024,
}


def family(folder: Path, model_type: str, fields: dict[str, Any]) -> str:
    """A config.json in the format of transformers."""
    from transformers import AutoConfig

    sizes = SIZES if model_type in (*FAMILIES, "gemma3n_text") and model_type != "gpt2" else {}
    AutoConfig.for_model(model_type, **{**sizes, **fields}).save_pretrained(folder)
    return str(folder / "config.json")


@pytest.mark.parametrize("model_type", FAMILIES)
def test_any_config_json(model_type: str, tmp_path: Path) -> None:
    """Model families without a file in this repository are predicted from their config.json."""
    path = family(tmp_path, model_type, FAMILIES[model_type])
    (found,) = estimated(Request(path).cell(8_192, 4, "alst", {}))
    assert found.fits


@pytest.mark.parametrize("model_type", REFUSED)
def test_unsupported_structures_are_named(
    model_type: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A missing or unsupported structure gives one line and exit code 2."""
    fields, words = REFUSED[model_type]
    path = family(tmp_path, model_type, fields)
    capsys.readouterr()
    assert run(monkeypatch, "predict", path, "--gpus", "4", "--seqlen", "8192") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def test_help_has_an_example(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The help of both commands has an example."""
    monkeypatch.setenv("COLUMNS", "200")
    for command in ("predict", "search"):
        assert not run(monkeypatch, command, "--help")
        assert f"Example: alst {command} llama3.1-8b" in capsys.readouterr().out


def test_every_limit_has_its_meaning() -> None:
    """Every limit that a search or prediction may name has a text."""
    assert LIMITS.keys() == set(get_args(Limit))


def test_hardware_of_a_user_is_a_row(tmp_path: Path) -> None:
    """A YAML file with the fields of a row is accepted."""
    path = tmp_path / "mine.yaml"
    path.write_text(small(MIB).model_dump_json())
    assert load_hardware(str(path)) == small(MIB)


def test_progress_goes_on_without_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A log keeps being told what runs, not only once."""
    monkeypatch.setattr(predict, "PATIENCE_S", 0.01)
    activities, last = iter(["building", "running"]), threading.Event()

    def doing() -> str:
        now = next(activities, "ending")
        if now == "ending":
            last.set()
        return now

    with predict.patience(doing):
        assert last.wait(30)
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "alst: building ..."
    assert re.fullmatch(r"alst: running, \d+ s \.\.\.", told[1])
