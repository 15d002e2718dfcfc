"""Whole decoder layers in tiles, attention in head groups, hand-written backward (`alst_impl.ops.layerwise`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from alst_impl.config import Precision, TrainConfig
from alst_impl.layout import Layout
from alst_impl.methods.base import Method, check_flash_by_name, check_sharded
from alst_impl.models import described, field
from alst_impl.ops.layerwise.headgroups import HeadGroups

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import DeviceMesh
    from transformers import PreTrainedModel

    from alst_impl.ops.memory.offload import HostOffload
    from alst_impl.placement import Evidence, Placement

LOSS_ROWS = 2048
"""Maximum tokens of a loss tile: 1 GiB of fp32 logits with a vocabulary of 128K."""

GROUPS = 4
"""Maximum number of head groups by default where a group projects all heads: it multiplies the projections' cost."""

SMALLEST_ROWS = 512
"""Minimum tokens of a tile by default. Smaller tiles cost a CPU more in call overhead than they save."""


class Layerwise(Method):
    """Our method: exact (but for `eight_bits`), with three to four full-length layer inputs at the peak of backward."""

    recomputes_layers: ClassVar[bool] = False
    knows: ClassVar[frozenset[str]] = frozenset(
        {"softcap", "sinks", "chunks", "mixers", "router loss"}
    )
    """What it does not compute, it refuses when it sees the layers."""
    """Layers with other mixers than attention are refused by their parts."""
    sp: int = Field(default=1, ge=1)
    """Sequence-parallel degree: ranks that share one sample."""
    groups: int | None = Field(default=None, ge=1)
    """Number of head groups that attention processes one after another.
    None processes one query head of each rank at a time where a group projects its own heads (Llama, Mistral, Qwen,
    Phi-3: `alst_impl.hf.known`). Any other layer projects all heads for each group, three times per step, so None is at
    most four groups there: with G groups, projections take 3 G + 4 passes instead of 7, and attention the memory of
    ALST's divided by G."""
    blocks: int | None = Field(default=None, ge=1)
    """Number of sequence blocks in attention: queries of one block attend to keys of one block at a time.
    More blocks shrink the attention kernel's workspace. Sums over blocks are in fp32. None is one block."""
    keep_attention: bool = False
    """Keep attention's output and log-sum-exp for backward.
    This doubles the host memory but avoids recomputing attention."""
    every: int = Field(default=1, ge=1)
    """Number of layers per checkpoint segment, which keeps one layer input.
    Backward recomputes the other inputs, which takes one more forward pass."""
    rows: int | None = Field(default=None, ge=1)
    """Tokens of a tile; None is the larger of `hidden_size` and 512. A loss tile has at most 2048."""
    offload: bool = True
    """Keep tensors that are saved for backward in host memory."""
    stream: bool = False
    """Keep layer inputs, attention's output and its gradient on the host, and fetch them by tile or head group.
    Layer inputs are fetched once per head group."""
    eight_bits: bool = False
    """Store layer inputs on the host in float8_e4m3fn with one scale per token.
    This takes half the bytes of bf16; gradients are then approximate."""
    overlap: bool = False
    """Exchange a head group while attention of the previous one runs. Needs memory for one more head group."""

    def check(self, config: TrainConfig) -> None:
        check_sharded(config, self.sp, "layerwise", knows=self.knows)
        check_flash_by_name(config, "layerwise")
        if not config.checkpoint:
            raise ValueError(
                "method 'layerwise' always checkpoints layer inputs, but checkpoint is false; set checkpoint: true"
            )
        for name in ("stream", "eight_bits"):
            if getattr(self, name) and not self.offload:
                raise ValueError(
                    f"{name} keeps tiles in host memory, but offload is false; set {name}: false or offload: true"
                )
        if self.overlap and self.sp == 1:
            raise ValueError(
                "overlap hides exchanges between ranks, but sp is 1; set overlap: false"
            )
        fields = described(config.model, config.overrides)
        if self.every > field(fields, "num_hidden_layers"):
            raise ValueError(
                f"every ({self.every}) is more than the {field(fields, 'num_hidden_layers')} layers of "
                f"'{config.model}'; use at most as many"
            )
        if self.every > 1 and self.keep_attention:
            raise ValueError(
                f"keep_attention keeps the attention of every layer, but every ({self.every}) recomputes layers; "
                "set keep_attention: false or every: 1"
            )
        if "num_attention_heads" in fields:
            heads = field(fields, "num_attention_heads")
            HeadGroups.of(heads, fields.get("num_key_value_heads") or heads, self.sp, self.groups)

    def layout(self, length: int) -> Layout:
        return Layout(length, sp=self.sp)

    def promises(self, config: TrainConfig) -> set[str]:
        promised = {"local_seqlen", "tiles"}
        if self.sp > 1:
            promised.add("exchanges")
        if self.offload:
            promised.add("offloaded_bytes")
        return promised

    def period(self) -> int:
        return self.every

    def precision(self, config: TrainConfig) -> Precision:
        return "float8_e4m3fn" if self.eight_bits else config.dtype

    def apply(
        self, model: PreTrainedModel, config: TrainConfig, mesh: DeviceMesh, placement: Placement
    ) -> None:
        from alst_impl import hf
        from alst_impl.hf import decoder
        from alst_impl.ops.attention.cores.base import load_core
        from alst_impl.ops.layerwise.exchange import Exchange
        from alst_impl.ops.layerwise.known import Known
        from alst_impl.ops.layerwise.layer import Layerwise as Layer
        from alst_impl.ops.layerwise.parts import Decoder
        from alst_impl.ops.memory.offload import HostOffload
        from alst_impl.ops.memory.segment import Segments

        load_core(config.attention).activate()
        group = mesh["sp"].get_group() if self.sp > 1 else None
        evidence = placement.evidence
        rows = self.rows or max(model.config.hidden_size, SMALLEST_ROWS)
        offload = HostOffload(placement) if self.offload else None
        num_layers = len(hf.decoder_layers(model))
        segments = Segments(self.every, num_layers) if self.every > 1 else None

        def prepared(layer: Decoder) -> Layer:
            return Layer(
                decoder=layer,
                groups=HeadGroups.of(
                    layer.num_heads,
                    layer.num_kv_heads,
                    self.sp,
                    self.groups,
                    most=None if isinstance(layer, Known) else GROUPS,
                ),
                exchange=Exchange(group, evidence, self.overlap),
                blocks=self.blocks,
                rows=rows,
                keep_attention=self.keep_attention,
                offload=offload,
                stream=self.stream,
                eight_bits=self.eight_bits,
                segments=segments,
                placement=placement,
            )

        if self.sp > 1:
            hf.refuse_positions_of_shards(model)
        # Layers on the device save their inputs there. With `stream`, the first layer overwrites the embeddings.
        release = self.offload and not self.stream and decoder.all_known(model)
        decoder.run_layers(model, self.sp, prepared)
        self._tile_the_rest(model, rows, offload, evidence, release=release)

    def _tile_the_rest(
        self,
        model: PreTrainedModel,
        rows: int,
        offload: HostOffload | None,
        evidence: Evidence,
        *,
        release: bool,
    ) -> None:
        """Tile what comes after the layers, the final norms and the loss, by `rows` tokens."""
        from alst_impl import hf
        from alst_impl.hf import decoder

        def tiles(x: Tensor) -> int:
            return -(-x.shape[1] // rows)

        def loss_tiles(x: Tensor) -> int:
            return -(-x.shape[1] // min(rows, LOSS_ROWS))

        for norm in hf.final_norms(model):
            if self.stream:
                assert offload is not None, "checked when the sweep was read"
                decoder.run_in_place(norm, rows, offload)
            else:
                hf.tile_module(norm, tiles, evidence)
        # Only the loss reads the hidden states, and no operation before it saves them.
        hf.tile_loss(model, loss_tiles, evidence, overwrite=True, release=release)

    def checkpoint(self, model: PreTrainedModel, placement: Placement) -> None:
        """Nothing to do: layers already keep only their inputs."""
