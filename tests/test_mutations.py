"""The suite notices what it must: each planted defect makes chosen tests fail.

A defect is an edit of the source of `alst_impl`, made in a copy that comes first on the path of a
forked process, which runs the chosen tests there.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TESTS = "tests/alst_impl/"
CONTEXT = multiprocessing.get_context("forkserver")
RAN = 100
"""Added to pytest's exit code, so that a crash of the process is not taken for a failed test."""


@dataclass(frozen=True)
class Mutation:
    """Edits of one file of `alst_impl`, and the tests that have to notice."""

    file: str
    edits: tuple[tuple[str, str], ...]
    tests: tuple[str, ...]


SP2 = "test_engines.py::test_alst_at_sp2_has_the_gradients_of_the_stock_model"
EXCHANGE = "test_ulysses.py::test_the_exchange_and_its_gradient_move_every_element_to_its_place[2]"

MUTATIONS = {
    "the global token count is local": Mutation(
        "step.py",
        (("    dist.all_reduce(valid)\n", ""),),
        (f"{SP2}[one-label-of-67]",),
    ),
    "the exchange's backward stays on its rank": Mutation(
        "ops/ulysses.py",
        (
            (
                "        return exchange(grad, ctx.group), None, None\n",
                "        b, h, s, d = grad.shape\n"
                "        p = ctx.group.size()\n"
                "        shape = (b, h * p, s // p, d) if ctx.to_heads else (b, h // p, s * p, d)\n"
                "        return grad.reshape(shape), None, None\n",
            ),
        ),
        (EXCHANGE,),
    ),
    "the exchange's backward goes the wrong way": Mutation(
        "ops/ulysses.py",
        (
            (
                "exchange = _sequence_for_heads if ctx.to_heads else _heads_for_sequence",
                "exchange = _heads_for_sequence if ctx.to_heads else _sequence_for_heads",
            ),
        ),
        (EXCHANGE,),
    ),
    "the last tile is dropped": Mutation(
        "ops/tiling.py",
        (
            (
                "for start in range(0, rows, size)]",
                "for start in range(0, max(rows - size, 1), size)]",
            ),
        ),
        ("test_tiling.py::test_tiled_equals_the_whole[9-2-1]",),
    ),
    "labels are shifted after sharding": Mutation(
        "data.py",
        (
            (
                "shifted = torch.nn.functional.pad(torch.stack(labels), (0, 1), value=IGNORE_INDEX)[:, 1:]",
                "shifted = torch.stack(labels)",
            ),
            (
                "shift_labels=cut(batch.shift_labels, IGNORE_INDEX)",
                "shift_labels=torch.nn.functional.pad("
                "cut(batch.shift_labels, IGNORE_INDEX), (0, 1), value=IGNORE_INDEX)[:, 1:]",
            ),
        ),
        ("test_data.py::test_labels_at_the_border_are_those_of_the_next_shards_first_token",),
    ),
    "the label on a shard border is lost in training": Mutation(
        "data.py",
        (
            (
                "shift_labels=cut(batch.shift_labels, IGNORE_INDEX)",
                "shift_labels=torch.nn.functional.pad("
                "cut(batch.shift_labels, IGNORE_INDEX)[:, :-1], (0, 1), value=IGNORE_INDEX)",
            ),
        ),
        (f"{SP2}[labels-on-the-border]",),
    ),
    "kv heads are replicated in another order": Mutation(
        "ops/ulysses.py",
        (("x.repeat_interleave(copies, dim=1)", "x.repeat(1, copies, 1, 1)"),),
        ("test_ulysses.py::test_copies_of_a_kv_head_stand_beside_it",),
    ),
    "weight gradients of tiles add up in bf16": Mutation(
        "ops/tiling.py",
        (("return torch.promote_types(parameter.dtype, torch.float32)", "return parameter.dtype"),),
        (
            "test_tiling.py::test_the_error_of_bf16_weight_gradients_does_not_grow_with_the_number_of_tiles",
        ),
    ),
    "gradients of the tiled loss ignore what comes from above": Mutation(
        "ops/loss.py",
        (("*sums.take(grad)", "*sums.take()"),),
        ("test_loss.py::test_tiled_loss_equals_the_whole_under_any_upstream_gradient[2-all]",),
    ),
    "offload returns zeros": Mutation(
        "ops/offload.py",
        (
            (
                "            target.copy_(piece, non_blocking=self._streams)\n",
                "            target.zero_()\n",
            ),
        ),
        ("test_offload.py::test_checkpointed_layers_have_the_gradients_of_plain_ones",),
    ),
    "the recomputed output stays alive": Mutation(
        "ops/offload.py",
        (("        del out\n", ""),),
        ("test_offload.py::test_the_recomputed_output_is_freed_before_the_layers_backward",),
    ),
    "blocks of a ring add up in bf16": Mutation(
        "ops/ring.py",
        (
            (
                "    wide = torch.promote_types(query.dtype, torch.float32)\n    rests",
                "    wide = query.dtype\n    rests",
            ),
        ),
        ("test_ring.py::test_the_error_does_not_grow_with_the_ring[dtype0-zigzag]",),
    ),
    "a ring forgets what it merged": Mutation(
        "ops/ring.py",
        (("torch.logaddexp(logsumexp, of_block, out=logsumexp)", "logsumexp.copy_(of_block)"),),
        ("test_ring.py::test_a_ring_equals_attention_over_the_whole_sequence[ring2]",),
    ),
    "gradients of keys stay where they were found": Mutation(
        "ops/ring.py",
        (("return grad_query, passing.wait()", "return grad_query, passing.sent"),),
        ("test_ring.py::test_a_ring_equals_attention_over_the_whole_sequence[ring2]",),
    ),
    "packed documents see each other": Mutation(
        "ops/attention.py",
        (("    if documents is not None:\n", "    if False:\n"),),
        ("test_attention.py::test_nothing_leaks_between_packed_documents",),
    ),
    "the sliding window is ignored": Mutation(
        "ops/attention.py",
        (("    if window is None or window >= seqlen:\n", "    if True:\n"),),
        ("test_attention.py::test_a_window_ends_where_it_says_at_the_edges_of_blocks[8]",),
    ),
    "fsdp2 averages over ranks": Mutation(
        "engines/fsdp2.py",
        (
            ("            sharded.set_gradient_divide_factor(1.0)\n", ""),
            ("            sharded.set_force_sum_reduction_for_comms(True)\n", ""),
        ),
        ("test_engines.py::test_gradients_are_not_clipped_unless_asked[fsdp2]",),
    ),
    "zero averages over ranks": Mutation(
        "engines/zero.py",
        (("loss * dist.get_world_size()", "loss"),),
        ("test_engines.py::test_gradients_are_not_clipped_unless_asked[zero]",),
    ),
    "wrapping a model changes its configuration object": Mutation(
        "hf.py",
        (('vars(module)["config"] = copy.deepcopy(config, memo)', "pass"),),
        ("test_hf.py::test_a_second_model_of_the_same_configuration_object_stays_as_it_was",),
    ),
}


def _run_tests(package: str, tests: list[str], output: str, scratch: str) -> None:
    """Body of a forked process: exits with `RAN` + pytest's code, its words are in `output`."""
    with Path(output).open("w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    sys.path.insert(0, package)
    os.chdir(ROOT)
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    import alst_impl

    assert alst_impl.__file__ == f"{package}/alst_impl/__init__.py"
    options = ["-q", "--assert=plain", "-p", "no:cacheprovider", f"--basetemp={scratch}"]
    options += ["-W", "ignore"]  # ranks forked from here inherit the filter, and libraries warn
    code = pytest.main([*tests, *options])
    sys.stdout.flush()
    os._exit(RAN + code)


def copy_of_package(tmp_path: Path, edits: dict[str, tuple[tuple[str, str], ...]]) -> Path:
    """The folder of a copy of `alst_impl` with `edits` by file."""
    package = tmp_path / "package"
    shutil.copytree(
        ROOT / "alst_impl", package / "alst_impl", ignore=shutil.ignore_patterns("__pycache__")
    )
    for file, replacements in edits.items():
        path = package / "alst_impl" / file
        source = path.read_text()
        for old, new in replacements:
            assert source.count(old) == 1, f"{file} holds {source.count(old)} times: {old}"
            source = source.replace(old, new)
        path.write_text(source)
    return package


def run_tests(
    tmp_path: Path, edits: dict[str, tuple[tuple[str, str], ...]], tests: list[str]
) -> str:
    """Whether `tests` "passed" or "failed" against a copy of `alst_impl` with `edits` by file."""
    package, output = copy_of_package(tmp_path, edits), tmp_path / "output"
    arguments = (
        str(package),
        [TESTS + test for test in tests],
        str(output),
        str(tmp_path / "scratch"),
    )
    process = CONTEXT.Process(target=_run_tests, args=arguments)
    process.start()
    process.join(120)
    assert process.exitcode is not None, "the chosen tests did not end"
    text = output.read_text()
    outcomes = {RAN + pytest.ExitCode.OK: "passed", RAN + pytest.ExitCode.TESTS_FAILED: "failed"}
    assert process.exitcode in outcomes, text
    return outcomes[process.exitcode]


def test_the_chosen_tests_pass_without_a_defect(tmp_path: Path) -> None:
    """Otherwise their failures would say nothing."""
    chosen = sorted({test for mutation in MUTATIONS.values() for test in mutation.tests})
    assert run_tests(tmp_path, {}, chosen) == "passed", (tmp_path / "output").read_text()


@pytest.mark.parametrize("defect", MUTATIONS)
def test_a_planted_defect_is_noticed(tmp_path: Path, defect: str) -> None:
    """The chosen tests fail where the defect stands."""
    mutation = MUTATIONS[defect]
    outcome = run_tests(tmp_path, {mutation.file: mutation.edits}, list(mutation.tests))
    assert outcome == "failed", (tmp_path / "output").read_text()
