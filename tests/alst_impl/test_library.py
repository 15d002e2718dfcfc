"""What `enable` and `shard` take and refuse."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from small import LENGTH, METHODS, batches, stock_gradients, stock_model
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from training import assert_same_gradients
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3ForCausalLM

import alst_impl
from alst_impl import hf

if TYPE_CHECKING:
    from conftest import Ranks

Batch = dict[str, Any]


FAMILIES = Path(__file__).parents[1] / "families"


def gradients(alst: Any, *inputs: Batch, called: Any = None) -> dict[str, Tensor]:
    """Gradients of a step of micro-batches."""
    count = alst.count(inputs)
    for batch in inputs:
        (called or alst.model)(**alst.shard(batch, num_items=count)).loss.backward()
    alst.reduce_gradients()
    return {n: p.grad for n, p in alst.model.named_parameters() if p.grad is not None}


# -- methods and groups ---------------------------------------------------------------------------


BARE = {"sp": 2, "tile_loss": False, "tile_mlp": False, "checkpoint": False, "offload": False}


def every_method(rank: int, world_size: int) -> None:
    """Body of a rank: gradients under every method, for both reductions, with dp if there are ranks left."""
    data = batches()
    truth = stock_gradients(stock_model(), data)
    for options in (*METHODS, BARE):
        for reduction in ("mean", "sum"):
            alst = alst_impl.enable(stock_model(), reduction=reduction, **options)
            mine = data
            if world_size > 2:  # each group has one sample of each batch
                group = alst.mesh.get_local_rank("dp")
                mine = [{k: v[group : group + 1] for k, v in batch.items()} for batch in data]
            assert_same_gradients(gradients(alst, *mine), truth)
            alst.model.zero_grad()
            count = alst.count(mine)
            with torch.no_grad():
                parts = [alst.model(**alst.shard(b, num_items=count)).loss for b in mine]
            stock, labels = stock_model(), int(count)
            losses = [stock(**b, num_items_in_batch=labels).loss for b in data]
            assert alst.reduce_loss(sum(parts)) == pytest.approx(float(sum(losses)))
            with alst.disabled(), torch.no_grad():
                ids = data[0]["input_ids"]
                assert torch.allclose(alst.model.eval()(ids).logits, stock.eval()(ids).logits)


@pytest.mark.parametrize("world_size", [2, 4], ids=["sp2", "dp2-sp2"])
def test_every_method_trains_as_the_stock_model(ranks: Ranks, world_size: int) -> None:
    """Accumulated micro-batches with unequal counts, means and sums; the stock forward inside `disabled`."""
    ranks(world_size)(every_method)


def whole_loss_of_family(rank: int, world_size: int, family: str) -> None:
    """Body of a rank: a model whose own forward computes its loss, under sequence parallelism."""
    fields = json.loads((FAMILIES / f"{family}.json").read_text())
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    torch.manual_seed(0)
    stock = AutoModelForCausalLM.from_config(config, dtype=torch.float64, **EAGER)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64, **EAGER)
    model.load_state_dict(stock.state_dict())
    data = batches()[:1]
    alst = alst_impl.enable(model, sp=2, tile_loss=False)
    assert_same_gradients(gradients(alst, *data), stock_gradients(stock, data))


EAGER = {"experts_implementation": "eager"}
"""The only one that knows fp64."""


def test_a_loss_function_may_be_called_by_position(ranks: Ranks) -> None:
    """As 38 model files of transformers do."""
    ranks(2)(whole_loss_of_family, "qwen3_moe")


def test_a_model_may_pass_its_arguments_to_its_loss_function_alone(ranks: Ranks) -> None:
    """As Falcon does: its decoder is not told how samples are shared, so attention has to know from the model's call."""
    ranks(2)(whole_loss_of_family, "falcon")


def given_mesh(rank: int, world_size: int) -> None:
    """Body of a rank: a mesh of the user's, with axes in any order."""
    for names, shape in ((("dp", "sp"), (2, 2)), (("sp", "dp"), (2, 2)), (("sp",), (4,))):
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        alst = alst_impl.enable(stock_model(), mesh)
        data = batches()[0]
        if "dp" in names:
            group = mesh.get_local_rank("dp")
            data = {k: v[group : group + 1] for k, v in data.items()}
        assert_same_gradients(gradients(alst, data), stock_gradients(stock_model(), batches()[:1]))
    with pytest.raises(ValueError, match="axes"):
        alst_impl.enable(stock_model(), init_device_mesh("cpu", (4,), mesh_dim_names=("tp",)))
    with pytest.raises(ValueError, match=r"sp \(2\) is not the size of the mesh's axis sp \(4\)"):
        alst_impl.enable(stock_model(), mesh, sp=2)


def test_a_mesh_of_the_user_is_used(ranks: Ranks) -> None:
    """Groups follow the mesh's axes. An unknown axis and another degree are refused."""
    ranks(4)(given_mesh)


# -- batches --------------------------------------------------------------------------------------


def documents() -> list[Tensor]:
    """Three documents, each int64 [1, n]; together one sample of `LENGTH` tokens."""
    ids = batches()[0]["input_ids"][:1]
    return list(ids.split([9, 4, LENGTH - 13], dim=1))


def packed() -> Batch:
    """The documents in one row, as a collator flattens them. No label is of a first token."""
    parts = documents()
    labels = [torch.cat([torch.full((1, 1), -100), part[:, 1:]], dim=1) for part in parts]
    positions = [torch.arange(part.shape[1])[None] for part in parts]
    return {
        "input_ids": torch.cat(parts, dim=1),
        "labels": torch.cat(labels, dim=1),
        "position_ids": torch.cat(positions, dim=1),
    }


def with_offsets(*, positions: bool) -> Batch:
    """The same with `cu_seq_lens_q`, with positions and numbers of documents or without."""
    offsets = torch.tensor([0, 9, 13, LENGTH], dtype=torch.int32)
    told: Batch = {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets, "max_length_q": 9}
    if positions:
        told["seq_idx"] = torch.tensor([0] * 9 + [1] * 4 + [2] * (LENGTH - 13))[None]
    return {k: v for k, v in {**packed(), **told}.items() if positions or k != "position_ids"}


def of_documents(model: Any, parts: list[Tensor]) -> dict[str, Tensor]:
    """Gradients of the stock model, each document by itself."""
    labels = torch.tensor(sum(part.shape[1] - 1 for part in parts))
    for ids in parts:
        model(input_ids=ids, labels=ids, num_items_in_batch=labels, use_cache=False).loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def read_batches(rank: int, world_size: int) -> None:
    """Body of a rank: packed and padded batches."""
    truth = of_documents(stock_model(), documents())
    for options in ({"sp": 2}, {"sp": 2, "method": "layerwise"}, {"sp": 1}):
        for batch in (packed(), with_offsets(positions=True), with_offsets(positions=False)):
            if options["sp"] == 1 and rank:
                batch["labels"] = torch.full_like(batch["labels"], -100)
            alst = alst_impl.enable(stock_model(), **options)
            assert_same_gradients(gradients(alst, batch), truth)
    # The same documents as a padded batch, with positions that collators leave at 1 in the padding.
    longest = max(part.shape[1] for part in documents())
    pad = torch.nn.functional.pad
    mask = torch.cat([pad(torch.ones_like(x), (0, longest - x.shape[1])) for x in documents()])
    padded = {
        "input_ids": torch.cat([pad(x, (0, longest - x.shape[1])) for x in documents()]),
        "labels": torch.cat([pad(x, (0, longest - x.shape[1]), value=-100) for x in documents()]),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).masked_fill(mask == 0, 1),
    }
    for method in ({"sp": 2}, {"cp": 2, "method": "ring"}):
        alst = alst_impl.enable(stock_model(), **method)
        assert_same_gradients(gradients(alst, padded), truth)


def test_packed_and_padded_batches_are_their_documents(ranks: Ranks) -> None:
    """By restarting positions, by offsets, and padded on the right: gradients of each document by itself."""
    ranks(2)(read_batches)


def refuse(rank: int, world_size: int) -> None:
    """Body of a rank: inputs that cannot be exact."""
    alst = alst_impl.enable(stock_model(), sp=2)
    good = batches()[0]
    ones = torch.ones_like(good["input_ids"])
    left = ones.clone()
    left[1, :3] = 0
    right = ones.clone()
    right[1, -3:] = 0
    offsets = torch.tensor([0, 8, LENGTH])
    for wrong, match in (
        ({"attention_mask": left}, "zeros left of tokens"),
        ({"attention_mask": right}, "labels of padded tokens are not -100"),
        ({"attention_mask": 2 * ones}, "not a padding mask of zeros and ones"),
        ({"attention_mask": ones[:, None]}, "not a padding mask"),
        ({"position_ids": ones[None]}, "not one position for each"),
        ({"position_ids": ones, "attention_mask": ones}, "restart beside an attention_mask"),
        ({"cu_seq_lens_q": offsets}, "of one flattened sample"),
        ({"seq_idx": (ones.cumsum(1) > 8).long()}, r"seq_idx numbers documents of \[\[8, 13\]"),
        ({"labels": good["labels"][:1]}, r"batch\['labels'\] has shape"),
        ({"labels": None}, "batch has no 'labels'"),
        ({"pixel_values": ones}, r"batch\['pixel_values'\] is unknown"),
        ({"labels": good["labels"].tolist()}, r"batch\['labels'\] is of type list, not a tensor"),
        ({"labels": -ones}, r"batch\['labels'\] has -1, but the model has the tokens 0 to 49"),
        ({"input_ids": 50 * ones}, r"batch\['input_ids'\] has 50"),
        (dict.fromkeys(("input_ids", "labels"), ones[:0]), "has no token"),
    ):
        with pytest.raises(ValueError, match=match):
            alst.shard({**good, **wrong})
    other = {**packed(), "cu_seq_lens_q": torch.tensor([0, 8, LENGTH])}
    with pytest.raises(ValueError, match="pass one of them"):
        alst.shard(other)
    # One rank's mistake is an error on all ranks, so that none waits.
    with pytest.raises(ValueError, match="another rank refused" if rank == 0 else "unknown"):
        alst.shard({**good, **({"pixel_values": ones} if rank else {})})
    with pytest.raises(ValueError, match="attention_mask is not supported"):
        alst.model(**alst.shard(good), attention_mask=ones)
    wrong_model = stock_model()
    wrong_model.config.attention_dropout = 0.1
    with pytest.raises(ValueError, match="'Qwen3ForCausalLM' has attention dropout"):
        alst_impl.enable(wrong_model, sp=2)
    with pytest.raises(ValueError, match="must divide world_size"):
        alst_impl.enable(stock_model(), sp=4)
    with pytest.raises(ValueError, match="runs its own schedule"):
        alst_impl.enable(stock_model(), method="seq1f1b")
    with pytest.raises(ValueError, match="known keys"):
        alst_impl.enable(stock_model(), sq=2)
    with pytest.raises(ValueError, match="not a transformers model"):
        alst_impl.enable(torch.nn.parallel.DistributedDataParallel(stock_model()), sp=2)
    with pytest.raises(ValueError, match="offload"):
        alst_impl.enable(stock_model(), sp=2, checkpoint=False)


def refuse_alone(rank: int, world_size: int) -> None:
    """Body of a rank: calls of a model that one rank has alone."""
    alst = alst_impl.enable(stock_model(), sp=1)
    for batch in (packed(), with_offsets(positions=False)):
        with pytest.raises(ValueError, match=r"only alst\.shard\(batch\) keeps packed documents"):
            alst.model(**batch, use_cache=False)
    with pytest.raises(ValueError, match="batch has no 'labels'"):
        alst.count([{"input_ids": batches()[0]["input_ids"]}])
    ids = torch.arange(24).view(2, 12) + 20
    fields = json.loads((FAMILIES / "qwen3_moe.json").read_text()) | {"output_router_logits": True}
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    routed = alst_impl.enable(AutoModelForCausalLM.from_config(config), sp=1)
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    with pytest.raises(ValueError, match=r"a router loss .* counts every token"):
        routed.shard(
            {"input_ids": ids, "labels": ids.masked_fill(mask == 0, -100), "attention_mask": mask}
        )


def test_calls_that_would_mix_documents_or_count_padding_are_refused(ranks: Ranks) -> None:
    """Also where no sample is shared between ranks."""
    ranks(1)(refuse_alone)


def test_inexact_inputs_are_refused(ranks: Ranks) -> None:
    """Masks, positions, offsets, unknown keys and wrong settings are each refused in one line, on all ranks."""
    ranks(2)(refuse)


def deal(rank: int, world_size: int) -> list[list[int]]:
    """Body of a rank: indices of two epochs."""
    alst = alst_impl.enable(stock_model(), sp=2)
    sampler = alst.sampler(range(10), seed=3)
    epochs = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
    with pytest.raises(ValueError, match="has no length"):
        alst.sampler(iter([]))
    return epochs


def test_ranks_that_share_samples_are_dealt_the_same(ranks: Ranks) -> None:
    """At dp 2 x sp 2 each group has half of the samples, in another order each epoch."""
    first, second, third, fourth = ranks(4)(deal)
    assert first == second
    assert third == fourth
    for mine, others in zip(first, third, strict=True):
        assert sorted(mine + others) == list(range(10))
    assert first[0] != first[1]


# -- the package ----------------------------------------------------------------------------------


def train_and_save(rank: int, world_size: int, folder: str) -> dict[str, int]:
    """Body of a rank: a step, and the saved model."""
    alst = importlib.import_module("alst_impl").enable(stock_model(), sp=world_size)
    batch = batches()[0]
    alst.model(**alst.shard(batch)).loss.backward()
    alst.reduce_gradients()
    torch.optim.SGD(alst.model.parameters(), lr=0.1).step()
    alst.model.save_pretrained(f"{folder}/{rank}")
    evidence: dict[str, int] = alst.evidence
    return evidence


def test_a_stock_model_is_saved(ranks: Ranks, tmp_path: Path) -> None:
    """The method ran, and its saved model is a plain one."""
    for evidence in ranks(2)(train_and_save, str(tmp_path)):
        assert evidence["exchanges"] > 0
        assert evidence["offloaded_bytes"] > 0
        assert evidence["tiles"] > 0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "0", dtype=torch.float64)
    assert type(loaded) is Qwen3ForCausalLM
    config = (tmp_path / "0" / "config.json").read_text()
    assert json.loads(config).get("_attn_implementation") is None
    assert f'"{hf.ATTENTION}"' not in config


EXTRAS = (
    "accelerate",
    "deepspeed",
    "harness",
    "matplotlib",
    "pandas",
    "peft",
    "psutil",
    "pynvml",
    "scipy",
    "seaborn",
    "snakemake",
    "yaml",
)


def train_without_extras(rank: int, world_size: int, folder: str) -> list[str]:
    """Body of a rank: `train_and_save` in a process that cannot import modules of an extra."""
    for name in list(sys.modules):
        if name.partition(".")[0] in (*EXTRAS, "alst_impl"):
            del sys.modules[name]
    sys.modules.update(dict.fromkeys(EXTRAS))
    train_and_save(rank, world_size, folder)
    return [name for name in EXTRAS if sys.modules[name] is not None]


def test_a_loop_needs_no_extra(ranks: Ranks, tmp_path: Path) -> None:
    """It runs and saves without DeepSpeed and without the packages that only the harness uses."""
    assert ranks(2)(train_without_extras, str(tmp_path)) == [[], []]


def test_the_package_imports_torch_only_when_it_is_used() -> None:
    """`import alst_impl` is cheap; its public names are there, and others are not."""
    said = "import sys, alst_impl; print('torch' in sys.modules, alst_impl.enable.__name__)"
    found = subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False", "enable"]
    with pytest.raises(AttributeError, match="no attribute 'disable'"):
        importlib.import_module("alst_impl").__getattr__("disable")


def test_enable_needs_a_process_group() -> None:
    """The error says how to start one."""
    assert not dist.is_initialized()
    with pytest.raises(ValueError, match="torchrun"):
        alst_impl.enable(stock_model())
