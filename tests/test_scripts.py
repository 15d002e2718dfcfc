"""The scripts of `experiments/loops`, as they stand: they train as the stock model does in one process."""

from __future__ import annotations

import contextlib
import io
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
from loops import LENGTHS, SCRIPTS, SEQLEN, arguments, make_folder
from small import LAUNCHER
from torch import Tensor
from torch.utils.data.distributed import DistributedSampler
from training import assert_same_gradients
from transformers import AutoModelForCausalLM, AutoTokenizer

if TYPE_CHECKING:
    from conftest import Ranks

RATE = 1000.0
"""A large rate of SGD makes the change of a weight its gradient, without rounding beside the weight."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of a model and of text."""
    return make_folder(tmp_path_factory.mktemp("loops"))


def samples(model: Path, data: Path, count: int, seed: int = 0) -> list[Tensor]:
    """The first `count` samples of an epoch, each int64 [1, S]: documents as a tokenizer cuts them."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = [p.read_text() for p in sorted(data.iterdir())]
    order = list(DistributedSampler(texts, num_replicas=1, rank=0, seed=seed))[:count]
    return [
        tokenizer(texts[i], truncation=True, max_length=SEQLEN, return_tensors="pt")["input_ids"]
        for i in order
    ]


def truth(model: Any, documents: Sequence[Tensor]) -> dict[str, Tensor]:
    """Gradients of the stock model in fp64: the mean over all labels, with each document by itself."""
    labels = torch.tensor(sum(ids.shape[1] - 1 for ids in documents))
    for ids in documents:
        model(input_ids=ids, labels=ids, num_items_in_batch=labels, use_cache=False).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def stock(folder: Path) -> Any:
    """The stock model of a folder, in fp64."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)


def change(before: Any, after: Any, rate: float = RATE) -> dict[str, Tensor]:
    """The gradient that took one model to the other, by name."""
    found = dict(after.named_parameters())
    with torch.no_grad():
        return {name: (p - found[name]) / rate for name, p in before.named_parameters()}


random_adapters = partial(peft.LoraConfig, init_lora_weights=False)


class SGD(torch.optim.SGD):
    """Takes the arguments of AdamW, and no notice of them."""

    rate = RATE

    def __init__(self, params: Any, **_: Any) -> None:
        super().__init__(params, lr=self.rate)


def run_script(rank: int, world_size: int, name: str, rate: float | None, argv: list[str]) -> str:
    """Body of a rank: runs a script as `torchrun` does. `rate` replaces AdamW by SGD. Returns what it printed."""
    import torch.distributed as dist

    os.environ.update(LAUNCHER)
    dist.init_process_group = lambda *_, **__: None  # the group exists
    if rate is not None:
        SGD.rate = rate
        torch.optim.AdamW = SGD
    sys.argv = [name, *argv]
    sys.path.insert(0, str(SCRIPTS))
    peft.LoraConfig = random_adapters
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        runpy.run_path(str(SCRIPTS / name), run_name="__main__")
    return printed.getvalue()


TRAINERS = ("trainer.py", "packed.py")
ENGINES = (
    *("bare.py", "chunks.py", "ddp.py", "fsdp2.py", "zero3.py", "accelerated.py"),
    *TRAINERS,
)


@pytest.mark.parametrize("world_size", [2, 4], ids=["sp2", "dp2-sp2"])
@pytest.mark.parametrize("name", ENGINES)
def test_a_script_has_the_gradients_of_the_stock_model(
    ranks: Ranks, folders: tuple[Path, Path], tmp_path: Path, name: str, world_size: int
) -> None:
    """Two micro-batches with unequal numbers of labels, padded or packed."""
    groups = world_size // 2
    batch = 2 if groups == 1 else 1
    settings = {"sp": 2, "steps": 1, "accumulate": 2, "batch": batch, "lr": RATE}
    argv = arguments(folders, tmp_path, **settings)
    ranks(world_size)(run_script, name, RATE, argv)
    model, data = folders
    seed = 42 if name in TRAINERS else 0
    expected = truth(stock(model), samples(model, data, groups * batch * 2, seed))
    assert_same_gradients(change(stock(model), stock(tmp_path)), expected)


@pytest.mark.parametrize("world_size", [2, 4], ids=["sp2", "dp2-sp2"])
def test_packed_documents_of_trl_have_the_gradients_of_the_stock_model(
    ranks: Ranks, folders: tuple[Path, Path], tmp_path: Path, world_size: int
) -> None:
    """One step over all documents: the real SFTTrainer ends each with a token and packs them in six rows."""
    seqlen, rows = 100, 6
    settings = {"sp": 2, "steps": 1, "batch": 4 // world_size, "accumulate": 3, "lr": RATE}
    ranks(world_size)(
        run_script, "sft.py", RATE, arguments(folders, tmp_path, seqlen=seqlen, **settings)
    )
    model, data = folders
    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = [p.read_text() + tokenizer.eos_token for p in data.iterdir()]
    documents = [tokenizer(t, return_tensors="pt")["input_ids"][:, :seqlen] for t in texts]
    assert rows < len(documents)
    assert_same_gradients(change(stock(model), stock(tmp_path)), truth(stock(model), documents))


def test_compiled_parts_have_the_gradients_of_the_stock_model(
    ranks: Ranks, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    """`model.compile()` compiles around collectives and tiles. Gradients stay."""
    argv = arguments(folders, tmp_path, sp=2, steps=1, accumulate=1, batch=1)
    ranks(2, timeout_s=300)(run_script, "compiled.py", RATE, argv)
    model, data = folders
    expected = truth(stock(model), samples(model, data, 1))
    assert_same_gradients(change(stock(model), stock(tmp_path)), expected)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("world_size", [2, 4], ids=["sp2", "dp2-sp2"])
def test_adapters_have_the_gradients_of_those_of_the_stock_model(
    ranks: Ranks, folders: tuple[Path, Path], tmp_path: Path, world_size: int
) -> None:
    """Both matrices of each adapter begin with random values here, so that each has a gradient."""
    groups = world_size // 2
    settings = {"sp": 2, "steps": 1, "accumulate": 2, "batch": 2 // groups}
    ranks(world_size)(run_script, "lora.py", RATE, arguments(folders, tmp_path, **settings))
    model, data = folders
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(model)
    started = peft.get_peft_model(base, random_adapters(r=8, target_modules="all-linear")).double()
    trained = peft.PeftModel.from_pretrained(stock(model), tmp_path)
    expected = truth(started, samples(model, data, 4))
    found = {name: g for name, g in change(started, trained).items() if name in expected}
    assert_same_gradients(found, expected)


def test_training_goes_on_at_another_sp(
    ranks: Ranks, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    """Two steps of AdamW at sp 2, and two more at dp 4: as four steps without a break, with the same samples."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    settings: dict[str, Any] = {"accumulate": 1, "lr": 1e-3}
    at_sp2 = {**settings, "sp": 2, "batch": 2}
    start = ranks(2)
    start(run_script, "resume.py", None, arguments(folders, whole, steps=4, **at_sp2))
    start(run_script, "resume.py", None, arguments(folders, parts, steps=2, **at_sp2))
    at_dp2 = {**settings, "sp": 1, "batch": 1}
    start(run_script, "resume.py", None, arguments(folders, parts, steps=4, **at_dp2))
    before, once, twice = (stock(path) for path in (folders[0], whole, parts))
    assert_same_gradients(change(before, twice), change(before, once), 1e-4, 1e-6)


def test_evaluation_and_generation_are_the_stock_models(
    ranks: Ranks, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    """The printed loss and text are those of the saved model, loaded without us."""
    settings = {"sp": 2, "steps": 2, "batch": 2, "lr": 1e-2}
    said = ranks(2)(run_script, "evaluate.py", None, arguments(folders, tmp_path, **settings))
    loss, text = said[0].strip().removeprefix("loss ").split(": ", 1)
    trained = stock(tmp_path).eval()
    model, data = folders
    documents = samples(model, data, len(LENGTHS))
    labels = sum(ids.shape[1] - 1 for ids in documents)
    with torch.no_grad():
        losses = [
            trained(input_ids=x, labels=x).loss * (x.shape[1] - 1) / labels for x in documents
        ]
    assert float(loss) == pytest.approx(float(sum(losses)), rel=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(model)
    prompt = tokenizer("def ", return_tensors="pt")
    expected = trained.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert text == repr(tokenizer.decode(expected[0]))


def test_the_trainer_evaluates_whole_samples(
    ranks: Ranks, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    """Here in one padded batch: the mean loss over all labels."""
    settings = {"sp": 2, "steps": 1, "batch": 1, "accumulate": 1, "lr": 1e-3}
    argv = arguments(folders, tmp_path, **settings)
    said = ranks(2)(run_script, "trainer.py", None, argv)[0]
    found = float(re.findall(r"'eval_loss': '?([0-9.]+)", said)[-1])
    trained = stock(tmp_path).eval()
    model, data = folders
    documents = samples(model, data, len(LENGTHS))
    with torch.no_grad():
        sums = [float(trained(input_ids=x, labels=x).loss) * (x.shape[1] - 1) for x in documents]
    labels = sum(x.shape[1] - 1 for x in documents)
    assert found == pytest.approx(sum(sums) / labels, rel=1e-4)


def test_a_script_runs_under_torchrun(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """In processes of its own, with a process group of its own."""
    argv = arguments(folders, tmp_path, sp=2, steps=1, accumulate=1)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run(
        [sys.executable, *launcher, str(SCRIPTS / "bare.py"), *argv], check=True, timeout=240
    )
    assert (tmp_path / "model.safetensors").is_file()


def test_the_readme_shows_a_script_that_is_tested() -> None:
    """README's example is a whole file."""
    readme = (SCRIPTS.parents[1] / "README.md").read_text()
    block = readme.partition("## Library")[2].partition("```python\n")[2].partition("```")[0]
    assert block == (SCRIPTS / "bare.py").read_text()
