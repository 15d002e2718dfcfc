"""Predictions, the search for the longest sequence, and their command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, get_args

import pytest

from alst_impl.config import Spec, TrainConfig
from alst_impl.models import published
from harness import __main__ as command_line
from harness.commands.predict import Kernel
from harness.hardware import Hardware, load_hardware
from harness.plain import bytes_value
from harness.predict import (
    GIB,
    INDEX_RANGE,
    OUTSIDE_BYTES,
    OUTSIDE_READINGS,
    PRECISION,
    Setting,
    predict,
    search,
)
from harness.prediction import LIMITS, Limit
from harness.scratch import ATTENTION_BACKWARD
from harness.worlds.sim import Offload, stretched

MIB = 2**20
PREDICTED = [
    "live_bytes",
    "scratch_bytes",
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
    "cost",
    "least_seconds_modelled",
]


def small(room: int, host: int = GIB) -> Hardware:
    """A GPU that leaves `room` bytes to the allocator, in a node of 8 with `host` bytes."""
    return Hardware(
        name="small",
        memory_bytes=OUTSIDE_BYTES + room,
        host_memory_bytes=host,
        devices_per_node=8,
        source="made up",
    )


def setting(
    hardware: Hardware, seqlen: int = 4_096, gpus: int = 2, method: dict[str, Any] | None = None
) -> Setting:
    """tiny-llama on `gpus` GPUs."""
    train = TrainConfig(
        model="tiny-llama",
        method=Spec(**(method or {"name": "alst", "sp": gpus})),
        engine=Spec(name="fsdp2"),
        seqlen=seqlen,
        world_size=gpus,
        dtype="bfloat16",
    )
    return Setting(train=train, hardware=hardware)


def at(of: Setting, seqlen: int) -> Setting:
    """The same run at another length."""
    return of.model_copy(update={"train": of.train.model_copy(update={"seqlen": seqlen})})


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
    """Categories to allocated, live and scratch to allocated, allocated and overhead to total."""
    p = predict(setting(small(GIB)))
    assert sum(p.by_category.values()) == p.allocated_bytes == p.live_bytes + p.scratch_bytes
    assert p.scratch_bytes == p.by_category.get("scratch", 0)
    assert p.allocated_bytes + p.overhead_bytes == p.total_bytes
    assert p.bytes_per_local_token is not None
    assert p.bytes_per_local_token > 0


def test_search_ends_on_the_limit() -> None:
    """The longest length fits, the shortest failing one does not, and both name the same limit."""
    of = setting(small(100 * GIB, host=100 * MIB))
    found = search(of)
    assert 0 < found.longest_tokens < found.shortest_failing_tokens
    gap = found.shortest_failing_tokens - found.longest_tokens
    assert gap <= max(PRECISION * found.shortest_failing_tokens, 2 * 256)
    assert predict(at(of, found.longest_tokens), slope=False).fits
    failing = predict(at(of, found.shortest_failing_tokens), slope=False)
    assert failing.limit == found.limit == "host_memory"


def test_nothing_fits() -> None:
    """A GPU without room for the parameters has a longest sequence of 0 tokens."""
    found = search(setting(small(MIB)))
    assert (found.longest_tokens, found.limit) == (0, "gpu_memory")


def test_optimizer_states_live_on_the_device_or_on_the_host() -> None:
    """Four bytes a parameter there, sharded like the parameters, or sixteen here; and nothing else moves."""
    of = setting(small(GIB), gpus=2)
    on_host = predict(of, slope=False)
    on_device = predict(of.model_copy(update={"optimizer_on_device": 4}), slope=False)
    parameters = 918_144
    assert on_device.by_category["optimizer"] == 4 * parameters // 2
    for field in ("live_bytes", "allocated_bytes", "total_bytes"):
        grown = getattr(on_device, field) - getattr(on_host, field)
        assert grown == 4 * parameters // 2, field
    assert on_host.host_bytes - on_device.host_bytes == 2 * (16 * parameters // 2)
    whole = of.train.model_copy(update={"engine": Spec(name="plain")})
    replicated = of.model_copy(update={"train": whole, "optimizer_on_device": 4})
    assert predict(replicated, slope=False).by_category["optimizer"] == 4 * parameters


def test_one_process_of_pytorch_has_a_context_and_no_more() -> None:
    """What the published stack holds outside the allocator is not charged to it."""
    of = setting(small(GIB))
    alone = of.model_copy(update={"stack": "pytorch"})
    saved = predict(of, slope=False).total_bytes - predict(alone, slope=False).total_bytes
    assert saved == OUTSIDE_BYTES - GIB


def test_heads_do_not_bound_a_ring() -> None:
    """Twice as many ranks as heads share a sample; what stops them is memory."""
    heads = published("tiny-llama")["num_attention_heads"]
    for method in ({"name": "ring", "cp": 2 * heads}, {"name": "usp", "cp": 2, "sp": heads}):
        p = predict(setting(small(MIB), gpus=2 * heads, method=method), slope=False)
        assert p.limit == "gpu_memory"


def test_heads_bound_the_ranks_of_a_sample() -> None:
    """Where heads keep ranks from sharing a sample, they are the limit; a smaller sp is a choice."""
    heads = published("tiny-llama")["num_attention_heads"]
    no_room = small(MIB)
    assert (
        predict(
            setting(no_room, gpus=2 * heads, method={"name": "alst", "sp": heads}), slope=False
        ).limit
        == "heads"
    )
    assert (
        predict(
            setting(no_room, gpus=2 * heads, method={"name": "alst", "sp": 1}), slope=False
        ).limit
        == "gpu_memory"
    )


def test_index_range_is_a_limit_of_the_published_stack_alone() -> None:
    """[tokens of a rank, hidden size] of 2^31 elements is where the recipes stop, whatever the memory."""
    train = TrainConfig(
        model="llama3.1-8b",
        overrides={"num_hidden_layers": 2},
        method=Spec(name="alst_recipe", sp=2),
        engine=Spec(name="fsdp2"),
        seqlen=2 * INDEX_RANGE // 4096,
        world_size=2,
        dtype="bfloat16",
    )
    recipe = Setting(train=train, hardware=small(10**15, 10**15))
    assert predict(recipe, slope=False).limit == "index_range"
    assert predict(at(recipe, train.seqlen - 2), slope=False).fits
    ours = train.model_copy(update={"method": Spec(name="alst", sp=2)})
    assert predict(recipe.model_copy(update={"train": ours}), slope=False).fits


def test_pinned_checkpoints_take_powers_of_two() -> None:
    """Host memory counts what PyTorch's pinned allocator takes, which pageable copies do not."""
    of = setting(small(GIB), seqlen=6_000)
    plain, pinned = (
        stretched(of.train, offload=Offload(pinned=pinned)).phases["backward"].host_bytes
        for pinned in (False, True)
    )
    layers, hidden = (published("tiny-llama")[k] for k in ("num_hidden_layers", "hidden_size"))
    assert plain == layers * 3_000 * hidden * 2
    assert pinned == layers * (1 << (3_000 * hidden * 2 - 1).bit_length()) > plain


def test_the_fit_of_the_overhead_is_this_code_s() -> None:
    """What the allocator model reserves for the fitted readings is what stands beside them."""
    runs = [(32_000, False), (300_000, True)]
    for (tokens, liger), (_, reserved) in zip(runs, OUTSIDE_READINGS.values(), strict=True):
        train = TrainConfig(
            model="llama3.1-8b",
            method=Spec(name="alst_recipe", liger=liger, tile_mlp=False, offload=False),
            engine=Spec(name="fsdp2"),
            seqlen=tokens,
            dtype="bfloat16",
        )
        trace = stretched(
            train,
            offload=Offload(parameters=True),
            kernel="flash_attention_3" if liger else "flash_attention_2",
        )
        assert trace.reserved_bytes / GIB == pytest.approx(reserved, abs=0.01)


# -- command line -----------------------------------------------------------------------------------


def test_predict_prints_the_agreed_keys(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One JSON object; `--explain` adds what is alive, with operator, shape, dtype, bytes and line."""
    arguments = ["predict", "tiny-llama", "--gpus", "2", "--seqlen", "4_096", "--json"]
    assert not run(monkeypatch, *arguments)
    answer = json.loads(capsys.readouterr().out)
    assert list(answer) == PREDICTED
    assert list(answer["flops"]) == ["paper_formula", "model_causal"]
    assert answer["limit"] in get_args(Limit)
    assert not run(monkeypatch, *arguments, "--explain")
    explained = json.loads(capsys.readouterr().out)
    alive = explained.pop("alive_at_peak")
    assert explained == answer
    assert sum(row["bytes"] for row in alive) == pytest.approx(answer["allocated_bytes"], rel=0.01)
    assert {"operator", "shape", "dtype", "bytes", "category", "line"} == alive[0].keys()
    assert any(row["line"] and row["line"].startswith("alst_impl/ops/") for row in alive)


def test_predict_reads_well(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bytes by category, host bytes, the verdict with its limit, both FLOPs and the time."""
    arguments = [
        "predict",
        "tiny-llama",
        "--gpus",
        "16",
        "--seqlen",
        "4096",
        "--host-memory",
        "1KB",
    ]
    assert not run(monkeypatch, *arguments, "--explain")
    text = capsys.readouterr().out
    for words in (
        "sp 8",
        "activations",
        "kernel scratch",
        "host memory",
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
    """One JSON object; the hardware is a row that a user wrote."""
    row = tmp_path / "mine.yaml"
    row.write_text(small(200 * MIB).model_dump_json())
    arguments = ["--gpus", "2", "--hardware", str(row), "--json"]
    assert not run(monkeypatch, "search", "tiny-llama", *arguments)
    answer = json.loads(capsys.readouterr().out)
    assert list(answer) == [
        "longest_tokens",
        "shortest_failing_tokens",
        "limit",
        "evaluations",
    ]
    assert answer["limit"] == "gpu_memory"
    of = setting(small(200 * MIB))
    assert predict(at(of, answer["longest_tokens"]), slope=False).fits
    failing = predict(at(of, answer["shortest_failing_tokens"]), slope=False)
    assert (failing.fits, failing.limit) == (False, "gpu_memory")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("no-such --seqlen 64", ["no-such", "llama3.1-8b"]),
        ("tiny-llama --seqlen 0", ["--seqlen", "0"]),
        ("tiny-llama --seqlen 1.5", ["--seqlen", "1.5"]),
        ("tiny-llama --seqlen many", ["--seqlen", "many"]),
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
        ("tiny-llama --seqlen 64 --kernel cpu", ["--kernel", "flash_attention_2"]),
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
    """What cannot be is exit code 2, one helpful line on stderr, and nothing written."""
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


FAMILIES: dict[str, dict[str, Any]] = {
    "phi3": {"pad_token_id": 0},
    "qwen2": {},
    "olmo2": {},
    "granite": {},
    "starcoder2": {},
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
"""Model types with configurations that no file here has: fields besides `SIZES`."""
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "gemma2": ({"head_dim": 32}, "soft-capped attention logits"),
    "mistral": ({"sliding_window": 256}, "sliding window"),
    "falcon": ({}, "has no module that uses transformers' attention interface"),
    "opt": ({}, "cannot be tiled along the sequence"),
    "gpt2": ({}, "has no 'num_attention_heads'"),
}
"""Those that cannot be predicted, and the structure that is to blame."""
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 1024,
}


def family(folder: Path, model_type: str, fields: dict[str, Any]) -> str:
    """A config.json as transformers writes it."""
    from transformers import AutoConfig

    sizes = SIZES if model_type != "gpt2" else {}
    AutoConfig.for_model(model_type, **{**sizes, **fields}).save_pretrained(folder)
    return str(folder / "config.json")


@pytest.mark.parametrize("model_type", FAMILIES)
def test_any_config_json(
    model_type: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Families without a file in this repository are predicted from their config.json."""
    path = family(tmp_path, model_type, FAMILIES[model_type])
    assert not run(monkeypatch, "predict", path, "--gpus", "4", "--seqlen", "8192", "--json")
    assert json.loads(capsys.readouterr().out)["fits"]


@pytest.mark.parametrize("model_type", REFUSED)
def test_what_stands_in_the_way_is_named(
    model_type: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A structure that is missing or not supported is one line and exit code 2."""
    fields, words = REFUSED[model_type]
    path = family(tmp_path, model_type, fields)
    capsys.readouterr()
    assert run(monkeypatch, "predict", path, "--gpus", "4", "--seqlen", "8192") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def test_help_has_an_example(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both commands explain themselves."""
    monkeypatch.setenv("COLUMNS", "200")
    for command in ("predict", "search"):
        assert not run(monkeypatch, command, "--help")
        assert f"Example: alst {command} llama3.1-8b" in capsys.readouterr().out


def test_names_on_the_command_line_are_the_tables() -> None:
    """Kernels are those whose scratch is known; every limit has its meaning."""
    assert set(get_args(get_args(Kernel)[0])) == ATTENTION_BACKWARD.keys()
    assert LIMITS.keys() == set(get_args(Limit))


@pytest.mark.parametrize(
    ("text", "nbytes"), [("4TB", 4 * 10**12), ("1.5 GiB", 3 * 2**29), ("80_000", 80_000)]
)
def test_sizes_as_people_write_them(text: str, nbytes: int) -> None:
    """Powers of 1000 and of 1024 have units of their own."""
    assert bytes_value(text) == nbytes


def test_hardware_of_a_user_is_a_row(tmp_path: Path) -> None:
    """A YAML file with the fields of a row."""
    path = tmp_path / "mine.yaml"
    path.write_text(small(MIB).model_dump_json())
    assert load_hardware(str(path)) == small(MIB)
