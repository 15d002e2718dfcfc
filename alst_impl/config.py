"""The configuration of a training run, as frozen data. Imports no torch, so sweeps expand in milliseconds."""

from __future__ import annotations

import re
from fractions import Fraction
from functools import cache
from itertools import pairwise
from types import UnionType
from typing import Annotated, Any, Literal, Self, Union, get_args, get_origin

import numpy as np
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PositiveInt,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

DType = Literal["float64", "float32", "bfloat16"]
Precision = DType | Literal["float8_e4m3fn"]
"""The coarsest format that rounds a gradient: the run's dtype, or a coarser one that a method's option uses."""
LabelMask = Literal["none", "prefix", "rank", "border", "imbalance", "all"]


MOST = 2**20
"""No run has more ranks, or samples of a micro-batch, or micro-batches of a step."""
TOO_LONG = 2**63
"""No length is as large: an index of 64 bits ends before it."""


def tokens(text: str) -> int:
    """A length such as `131072`, `131_072`, `131,072`, `128K` or `1M`. K and M are 2**10 and 2**20.

    Raises `ValueError` for anything else, and for a length below 1 or from `TOO_LONG`.
    """
    found = re.fullmatch(
        r"([0-9][0-9_]*|[0-9]{1,3}(?:,[0-9]{3})+)(\.[0-9]+)?([KkMm]?)", text.strip()
    )
    count = Fraction(0)
    if found is not None:
        scale = {"": 1, "K": 2**10, "M": 2**20}[found[3].upper()]
        count = Fraction(re.sub("[_,]", "", found[1]) + (found[2] or "")) * scale
    if not 1 <= count < TOO_LONG or count.denominator != 1:
        raise ValueError(
            f"'{text}' is not a length; write a number of tokens from 1, such as 131_072, or 128K, which is the same "
            "(K is 1,024 and M is 1,048,576)"
        )
    return int(count)


def _tokens(value: Any) -> Any:
    return tokens(value) if isinstance(value, str) else value


Tokens = Annotated[int, BeforeValidator(_tokens), Field(gt=0, lt=TOO_LONG)]
"""A length in tokens, or text as `tokens` takes it."""


@cache
def _admits_bool(model: type[BaseModel], field: str | None) -> bool:
    """Whether `field` of `model` may be a boolean."""
    assert field is not None
    kinds = [model.model_fields[field].annotation]
    while kinds:
        kind = kinds.pop()
        if kind in (Any, bool):
            return True
        if get_origin(kind) in (UnionType, Union, Annotated):
            kinds.extend(get_args(kind))
    return False


class Frozen(BaseModel):
    """Base of every configuration and record: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def a_boolean_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        # Otherwise pydantic takes `sp: yes` for 1.
        if isinstance(value, bool) and not _admits_bool(cls, info.field_name):
            raise ValueError("true and false are no value of it; write a number or a name")
        return value


class Spec(Frozen):
    """A plug-in by name with its options; written `name` or `{name: ..., option: value}`."""

    name: str
    """File name of the plug-in, without `.py`."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Fields of the plug-in's class."""

    @model_validator(mode="before")
    @classmethod
    def options_stand_beside_the_name(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"name": value}
        if isinstance(value, dict) and "name" in value and "options" not in value:
            return {
                "name": value["name"],
                "options": {k: v for k, v in value.items() if k != "name"},
            }
        return value

    @model_serializer
    def as_written(self) -> dict[str, Any]:
        return {"name": self.name, **self.options}

    def __str__(self) -> str:
        """The name, and the options in parentheses, as in `flex (pattern=window (window=8))`."""
        options = ", ".join(f"{name}={_shown(value)}" for name, value in self.options.items())
        return f"{self.name} ({options})" if options else self.name


def _shown(value: Any) -> Any:
    return Spec(**value) if isinstance(value, dict) and "name" in value else value


NameOrSpec = Annotated[
    Spec,
    PlainSerializer(lambda spec: spec.as_written() if spec.options else spec.name),
]
"""A plug-in that is written as its name alone where it has no options, as it was before it could have some."""


EXCERPTS = Spec(name="excerpts")
"""The usual source. Cells and records do not mention it, so their keys are those from before there were others."""


class DataConfig(Frozen):
    """Which tokens a run trains on. Together with `TrainConfig.seed`, it fixes every sample."""

    corpus: str = "python-stdlib"
    """`python-stdlib` (sources of Python's own library) or a path to a text file or folder."""
    tokenizer: str = "bytes"
    """`bytes` (token = byte) or a local folder of a Hugging Face tokenizer."""
    source: Spec = Field(default=EXCERPTS, exclude_if=lambda source: bool(source == EXCERPTS))
    """File in `alst_impl/sources/` and its options: how samples are cut from the corpus."""
    documents: PositiveInt | tuple[Tokens, ...] = 1
    """Documents packed into one sample, each with positions from 0: their number, with random lengths, or their
    lengths, which repeat until the sample is full. 1 is one unpacked document."""
    mask: LabelMask = "none"
    """Which labels are ignored: see `alst_impl.data.LABEL_MASKS`."""

    @property
    def packed(self) -> bool:
        """Whether samples hold several documents."""
        return self.documents != 1

    def lengths(self, seqlen: int, seed: int, index: int) -> tuple[int, ...]:
        """Document lengths of sample `index` of `seqlen` tokens."""
        return self.drawn_lengths(seqlen, np.random.default_rng([seed, index]))

    def drawn_lengths(self, seqlen: int, rng: np.random.Generator) -> tuple[int, ...]:
        """Document lengths of a sample of `seqlen` tokens; `rng` draws them if only their number is given."""
        if isinstance(self.documents, tuple):
            ends = np.cumsum(np.tile(self.documents, -(-seqlen // sum(self.documents))))
        else:
            count = min(self.documents, seqlen)
            ends = np.sort(rng.permutation(seqlen - 1)[: count - 1] + 1)
        borders = [0, *(int(end) for end in ends if end < seqlen), seqlen]
        return tuple(stop - start for start, stop in pairwise(borders))


class OptimizerConfig(Frozen):
    """The optimizer, the same under every engine."""

    name: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or SGD without momentum, whose update is the gradient times the learning rate."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Constant learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of AdamW's first and second moments."""
    eps: float = 1e-8
    """Added to the square root of AdamW's second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay under AdamW; added to the gradient under SGD."""
    max_grad_norm: float | None = Field(default=None, gt=0)
    """Clip the global L2 norm of the gradient to this value; None does not clip."""


class LoraConfig(Frozen):
    """Low-rank adapters beside frozen weights (arXiv:2106.09685), created by peft."""

    rank: int = Field(gt=0)
    """Rank of an adapter."""
    alpha: int = Field(default=16, gt=0)
    """An adapter's output is multiplied by alpha / rank."""
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    """Names of the projections that get an adapter."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability that an adapter drops a feature of its input."""


class TrainConfig(Frozen):
    """Everything that determines a training run."""

    model: str
    """Name of a published configuration in `alst_impl/models/`, or a path to a `config.json` or to
    a local folder with real weights."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Fields of the model's configuration to change, such as `num_hidden_layers`."""
    method: Spec
    """File in `alst_impl/methods/` and its options."""
    engine: Spec = Spec(name="zero")
    """File in `alst_impl/engines/` and its options."""
    seqlen: Tokens
    """Tokens of one sample, before sharding. A source may cut it into shorter sequences."""
    batch_size: int = Field(default=1, gt=0, le=MOST)
    """Samples per data-parallel rank and micro-batch."""
    accumulation: int = Field(default=1, gt=0, le=MOST)
    """Micro-batches per optimizer step. If there are several, they hold unequal numbers of labels."""
    world_size: int = Field(default=1, gt=0, le=MOST)
    """Number of ranks."""
    dtype: DType = "float32"
    """Dtype of parameters and activations."""
    attention: NameOrSpec = Spec(name="sdpa")
    """Core attention: a file in `alst_impl/ops/attention/cores/` and its options.
    With `sdpa`, PyTorch chooses the kernel; every other name is one CUDA kernel. That of `flex` is compiled, for
    windows, chunks, soft-caps and sinks, most of which `sdpa` computes in slow tiles on a GPU. Method 'baseline'
    under `sdpa` uses transformers' eager attention for models without a fused one (sinks, soft-caps).
    `sdpa` and `flex` take a `pattern` of keys that a query sees: `{name: flex, pattern: {name: window, window: 4_096}}`.
    Patterns are the files in `alst_impl/ops/attention/patterns/`; `sdpa` computes them in tiles of plain PyTorch."""
    lora: LoraConfig | None = None
    """Train only adapters; None trains every weight."""
    checkpoint: bool = True
    """Activation checkpointing of every decoder layer."""
    data: DataConfig = DataConfig()
    """The training data."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """The optimizer."""
    seed: int = Field(default=0, ge=0)
    """Seed of the initial weights and of the data."""

    @model_validator(mode="after")
    def documents_have_a_token_each(self) -> Self:
        count = self.data.documents
        if isinstance(count, int) and count > self.seqlen:
            raise ValueError(
                f"{count:,} documents do not fit in a sample of {self.seqlen:,} tokens; use at most as many, or their "
                f"lengths ({count},)"
            )
        return self
