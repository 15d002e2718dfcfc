"""What `alst predict`, `search` and `plan` are asked: the run, but for its method, its degrees and its length."""

from __future__ import annotations

import functools
import inspect
import math
import re
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from importlib.metadata import version
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

import typer

from alst_impl.config import Spec, tokens
from alst_impl.engines.base import load_engine
from alst_impl.methods.base import load_method
from alst_impl.models import canonical, described, field
from alst_impl.ops.attention.cores.base import load_core
from harness.cells.cell import Cell, check_kernel, make_cell
from harness.cells.hardware import is_file, row_name
from harness.cells.units import bytes_value
from harness.commands.options import core_spec, length, share

Result = TypeVar("Result")
States = Literal["host", "gpu"]
OFFLOADS = {"zero": "offload_optimizer", "fsdp2": "offload"}
"""Engine -> its option that moves training states to host memory."""
Seqlen = Annotated[
    int,
    typer.Option(
        parser=length,
        metavar="TOKENS",
        help="Tokens of one sample; 128K is 131,072, and 128_000 is 128,000.",
    ),
]


@dataclass(frozen=True)
class Request:
    """Options that the commands share."""

    model: Annotated[
        str,
        typer.Argument(
            help="A model as `alst models` lists it, a config.json, a folder with one, or a name of a hub that the cache has."
        ),
    ]
    hardware: Annotated[
        str,
        typer.Option(help="A row as `alst hardware` lists it, or a YAML file with one."),
    ] = "h100-80gb"
    host_memory: Annotated[
        str | None,
        typer.Option(
            show_default="the hardware's", help="Host memory of one node, such as 4TB or 1900GiB."
        ),
    ] = None
    kernel: Annotated[
        str,
        typer.Option(
            help="Attention kernel: a file in alst_impl/ops/attention/cores/. The time is that kernel's; the bytes are "
            "those of PyTorch's own where the kernel cannot run on a phantom device."
        ),
    ] = "sdpa"
    pattern: Annotated[
        str | None,
        typer.Option(
            metavar="NAME:KEY=VALUE,...",
            show_default="all keys before a query",
            help="Keys that a query sees, with kernel flex, or of methods ring and usp with theirs: a file in "
            "alst_impl/ops/attention/patterns/ and its options, such as window:window=4096,global_tokens=64.",
        ),
    ] = None
    engine: Annotated[
        str | None,
        typer.Option(
            show_default="zero for deepspeed_alst, else fsdp2", help="A file in alst_impl/engines/."
        ),
    ] = None
    lora: Annotated[
        str | None,
        typer.Option(
            metavar="RANK[:NAMES]",
            show_default="train every weight",
            help="Train adapters of this rank at the projections NAMES, such as 16:q_proj,v_proj.",
        ),
    ] = None
    batch: Annotated[
        int,
        typer.Option(min=1, help="Samples of a micro-batch, per group of ranks that share them."),
    ] = 1
    accumulate: Annotated[int, typer.Option(min=1, help="Micro-batches of an optimizer step.")] = 1
    documents: Annotated[
        str,
        typer.Option(
            metavar="NUMBER|LENGTHS",
            help="Documents packed into a sample: their number, such as 16, of random lengths, or their lengths, with "
            "a comma or a K, which repeat until the sample is full: 4K, or 1000,3000.",
        ),
    ] = "1"
    dtype: Annotated[str, typer.Option(help="Of parameters and activations.")] = "bfloat16"
    margin: Annotated[
        float,
        typer.Option(
            parser=share, metavar="SHARE", help="Share of the GPU's memory to leave free."
        ),
    ] = 0.05
    allocator: Annotated[
        Literal["expandable", "native"],
        typer.Option(help="Whether PyTorch's allocator uses expandable segments."),
    ] = "expandable"

    def cell(
        self, seqlen: int, gpus: int, method: str, options: dict[str, Any], states: States = "host"
    ) -> Cell:
        """The checked cell of this run with `method` and its `options`; sp, then cp, are the largest legal degrees
        that `options` do not say. Raises `ValueError` for an impossible one.
        """
        attention = core_spec(self.kernel, self.pattern)
        runs = load_core(attention).flash or self.pattern is not None
        cell = make_cell(
            {
                "model": canonical(self.model),
                "method": {"name": method, "options": self._with_degrees(gpus, method, options)},
                "engine": engine_of(self.engine or default_engine(method), states),
                "seqlen": seqlen,
                "batch_size": self.batch,
                "accumulation": self.accumulate,
                "world_size": gpus,
                "dtype": self.dtype,
                "attention": attention if runs else "sdpa",
                "lora": _lora(self.lora),
                "data": {"documents": _documents(self.documents)},
                "world": "phantom",
                "hardware": self._hardware(),
                "expandable_segments": self.allocator == "expandable",
                "simulation": {
                    "host_memory_bytes": None
                    if self.host_memory is None
                    else bytes_value(self.host_memory),
                    "margin": self.margin,
                    "search": False,
                    "timed_as": None if runs else self.kernel,
                },
            }
        )
        check_kernel(cell)
        return cell

    def assumed(self, cell: Cell, states: States | None) -> str:
        """The options of `cell`, defaults included, as they would be typed; those that are unset are left out."""
        own = {each.name: getattr(self, each.name) for each in fields(self)[1:]}
        options = {**own, "engine": cell.train.engine.name, "states": states}
        written = [f"--{k.replace('_', '-')} {v}" for k, v in options.items() if v is not None]
        return f"options: {' '.join(written)}"

    def _hardware(self) -> str:
        """The name of a row, or a path to a YAML file."""
        return self.hardware if is_file(self.hardware) else row_name(self.hardware)

    def _with_degrees(self, gpus: int, method: str, options: dict[str, Any]) -> dict[str, Any]:
        offered = type(load_method(Spec(name=method))).model_fields
        heads = field(described(canonical(self.model)), "num_attention_heads")
        if "sp" in offered:
            left = max(gpus // _degree(options, "cp"), 1)
            options = {"sp": math.gcd(left, heads), **options}
        if "cp" in offered:
            options = {"cp": max(gpus // _degree(options, "sp"), 1), **options}
        return options


def asking(command: Callable[..., Result]) -> Callable[..., Result]:
    """`command`, with the options of `Request` in place of its parameter `request`."""
    hints = get_type_hints(Request, include_extras=True)
    own = [
        p
        for p in inspect.signature(command, eval_str=True).parameters.values()
        if p.name != "request"
    ]
    asked = [
        inspect.Parameter(
            each.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if each.default is MISSING else each.default,
            annotation=hints[each.name],
        )
        for each in fields(Request)
    ]
    listed = [
        *asked[:1],
        *(p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own),
        *asked[1:],
    ]

    @functools.wraps(command)
    def called(**given: Any) -> Result:
        request = Request(**{each.name: given.pop(each.name) for each in asked})
        return command(request=request, **given)

    called.__annotations__ = {p.name: p.annotation for p in listed}
    vars(called)["__signature__"] = inspect.Signature(listed)
    return called


def default_engine(method: str) -> str:
    """The engine that shards training states over all ranks: `zero` for `deepspeed_alst`, else `fsdp2`."""
    return "zero" if method == "deepspeed_alst" else "fsdp2"


def places(engine: str) -> tuple[States, ...]:
    """Where the training states of `engine` can live."""
    return ("gpu", "host") if engine in OFFLOADS else ("gpu",)


def engine_of(name: str, states: States) -> dict[str, Any]:
    """Engine `name` with training states in host memory or on the GPUs. Raises `ValueError` if it is unknown or has
    no choice.
    """
    load_engine(Spec(name=name))
    offload = OFFLOADS.get(name)
    if offload is not None:
        return {"name": name, offload: states == "host"}
    if states == "host":
        raise ValueError(f"engine '{name}' keeps training states on the GPUs; use --states gpu")
    return {"name": name}


def about(cell: Cell) -> dict[str, Any]:
    """What a JSON answer is about: the run and the versions of what ran it."""
    packages = ("alst-bench", "torch", "transformers")
    return {
        "asked": cell.model_dump(mode="json"),
        "versions": {name: version(name) for name in packages},
    }


def _lora(text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    rank, _, targets = text.partition(":")
    if not rank.isdigit() or not int(rank):
        raise ValueError(
            f"--lora {text}: '{rank}' is no rank; write such as 16 or 16:q_proj,v_proj"
        )
    names = targets.split(",") if ":" in text else []
    if not all(names):
        raise ValueError(f"--lora {text}: a name is missing; write such as 16 or 16:q_proj,v_proj")
    return {"rank": int(rank), **({"targets": names} if names else {})}


def _documents(text: str) -> int | list[int]:
    try:
        numbers = [tokens(part) for part in text.rstrip(",").split(",")]
    except ValueError:
        raise ValueError(
            f"--documents {text}: write a number of documents, such as 16, or lengths, such as 4K, or 1000,3000"
        ) from None
    counted = re.fullmatch(r"[0-9_]+", text)
    return numbers[0] if counted else numbers


def _degree(options: dict[str, Any], name: str) -> int:
    """The option `name`, by default 1. Raises `ValueError` if it is not a number of ranks."""
    given = options.get(name, 1)
    if not isinstance(given, int) or given < 1:
        raise ValueError(f"--option {name}={given}: a number of ranks is 1 or more")
    return given
