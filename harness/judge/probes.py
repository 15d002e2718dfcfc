"""Probes: properties of every correct training run, tested without a reference.

Each probe runs the model, method and data of a cell on its ranks and inspects the outputs.
Legend: B batch, S sequence, P sequence-parallel degree, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import DeviceMesh
from torch.utils._python_dispatch import TorchDispatchMode

from alst_impl.data import Batch
from alst_impl.engines.base import Runtime
from alst_impl.methods.base import Method
from alst_impl.placement import Placement
from alst_impl.step import accumulate_gradients, micro_batches, start
from harness.cells.cell import Cell
from harness.gate.truths import corpus_of
from harness.processes.jobs import Rank
from harness.records.record import Finding
from harness.worlds.base import load_world

ROUNDING = 1e-5
"""Largest change of a logit that counts as rounding, relative to the largest logit."""


def execute(rank: Rank, payload: dict[str, Any]) -> list[dict[str, Any]]:
    """All probes of `payload["cell"]`. Every rank returns the same findings, which hold for all ranks. Collective."""
    cell = Cell(**payload["cell"])
    world = load_world(cell.world)
    with world.group(rank, cell) as mesh:
        placement = Placement(device=world.device)
        method, runtime = start(cell.train, mesh, placement)
        probe = _Probe(cell, mesh, method, runtime)
        found = [probe.streams(), probe.shards(), probe.causality(), probe.documents()]
        # Last, because its backward leaves gradients.
        found.append(probe.tiles())
        return [finding.model_dump() for finding in found]


class _Probe:
    """The model of one cell on this rank, with one method per probe."""

    def __init__(self, cell: Cell, mesh: DeviceMesh, method: Method, runtime: Runtime) -> None:
        self.train, self.mesh, self.method, self.runtime = cell.train, mesh, method, runtime
        dp, size = mesh.get_local_rank("dp"), cell.train.batch_size
        self.corpus = corpus_of(cell.train)
        first = dp * size
        self.whole = self.corpus.batch(range(first, first + size))
        planned = method.plan([self.whole.layout.length], cell.train.world_size)
        self.layout = replace(planned[dp], mesh=mesh)

    def streams(self) -> Finding:
        """The ranks that share a sample hold it together; each dp rank has another sample."""
        shard = self.method.shard(self.whole, self.layout)
        dp, held = self.mesh["dp"], stream_hash(self._gathered(shard.input_ids))
        found = _all([dp.get_local_rank(), held, stream_hash(self.whole.input_ids)])
        streams = {index: seen for index, seen, _ in found}
        whole = all(seen == wanted for _, seen, wanted in found)
        passed = whole and len(set(streams.values())) == len(streams) == dp.size()
        shown = ", ".join(f"dp {index}: {seen:016x}" for index, seen in sorted(streams.items()))
        return Finding(probe="token streams", passed=passed, detail=shown)

    def shards(self) -> Finding:
        """The decoder gets only this rank's shard of the sequence."""
        seen: list[int] = []
        decoder = self._model().base_model

        def look(_: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            ids: Tensor = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
            seen.append(ids.shape[1])

        handle = decoder.register_forward_pre_hook(look, with_kwargs=True)
        self._logits(self.whole)
        handle.remove()
        lengths = {length for rank in _all(seen) for length in rank}
        local, shards = self.layout.local, self.layout.shards
        detail = f"{sorted(lengths)} of {self.layout.length} tokens on each of {shards} ranks"
        return Finding(probe="shard length", passed=lengths == {local}, detail=detail)

    def causality(self) -> Finding:
        """A changed token changes its own logits and no earlier ones."""
        place = self.layout.length // 2
        moved = self._moved_by(place)
        passed = not moved[:, :place].any() and bool(moved[:, place].all())
        return self._agreed(
            "causality", f"token {place} changed; {_span(moved)} moved", passed=passed
        )

    def documents(self) -> Finding:
        """A changed token changes no logit of another document."""
        if self.whole.layout.documents is None:
            return Finding(
                probe="packed documents", passed=True, detail="one document: none to leak to"
            )
        lengths = self.whole.layout.documents[0]
        first, second = lengths[0], lengths[0] + lengths[1]
        # The first token of the second document is next to the first document, where a leak backward shows,
        # and a leak forward shows in every token after its document.
        moved = self._moved_by(first)[:1]
        inside = moved[:, first:second]
        passed = (
            not moved[:, :first].any() and not moved[:, second:].any() and bool(inside[:, 0].all())
        )
        detail = f"documents {list(lengths)}; token {first} changed; {_span(moved)} moved"
        return self._agreed("packed documents", detail, passed=passed)

    def tiles(self) -> Finding:
        """In a whole step, no logits and no MLP activations have more rows than a tile."""
        options = self.method.model_dump()
        tiles = options.get("tiles")
        fields = self._model().config
        watched = {}
        if options.get("tile_loss"):
            watched["logits"] = fields.vocab_size
        if options.get("tile_mlp") and not hasattr(fields, "num_experts"):
            watched["MLP"] = fields.intermediate_size
        if tiles is None or not watched:
            return Finding(probe="tiles", passed=True, detail="nothing is tiled by number")
        local = self.layout.local
        limit = math.ceil(local / min(tiles, local)) * len(self.whole.input_ids)
        batches = micro_batches(
            self.train, self.corpus, self.method, self.mesh, 0, self.runtime.placement.device
        )
        rows = _Rows(set(watched.values()), fields.hidden_size)
        with rows:
            accumulate_gradients(self.method, self.runtime, batches)
        largest = {name: rows.largest.get(width, 0) for name, width in watched.items()}
        passed = all(0 < count <= limit for count in largest.values())
        shown = ", ".join(f"{name} {count} rows" for name, count in largest.items())
        return self._agreed("tiles", f"at most {shown}; a tile has {limit}", passed=passed)

    def _model(self) -> Any:
        """The transformers model without the wrapper of its engine."""
        module: Any = self.runtime.module
        return getattr(module, "module", module)

    def _logits(self, whole: Batch) -> Tensor:
        """[B, S, V] of the unsharded `whole`. Collective."""
        shard = self.method.shard(whole, self.layout).to(self.runtime.placement.device)
        inputs = shard.model_inputs()
        del inputs["labels"], inputs["shift_labels"]
        with torch.no_grad():
            logits: Tensor = self.runtime.module(**inputs, use_cache=False).logits
        return self._gathered(logits)

    def _moved_by(self, place: int) -> Tensor:
        """Positions whose logits change with token `place`: bool [B, S]. Collective."""
        ids = self.whole.input_ids.clone()
        # Adding 7 modulo 256 always gives another token, and every vocabulary has these 256 tokens.
        ids[:, place] = (ids[:, place] + 7) % 256
        changed = replace(self.whole, input_ids=ids)
        before, after = self._logits(self.whole), self._logits(changed)
        # A change of one row can change the rounding of others in the same product; a leak is far larger.
        return (before - after).abs().amax(dim=-1) > ROUNDING * before.abs().max()

    def _gathered(self, shard: Tensor) -> Tensor:
        """[B, S/P, ...] -> [B, S, ...], from the ranks that share the sample. Collective."""
        shards = shard.contiguous()[None]
        for axis in ("sp", "cp"):
            group = self.layout.group(axis)
            if group is not None:
                parts = [torch.empty_like(shards) for _ in range(group.size())]
                dist.all_gather(parts, shards, group=group)
                shards = torch.cat(parts)
        # Probe `shards` tells of a shard that is not what the layout says.
        if shard.shape[1] != self.layout.local:
            return torch.cat(shards.unbind(), dim=1)[:, : self.layout.length]
        return self.layout.whole(shards.unbind())

    def _agreed(self, probe: str, detail: str, *, passed: bool) -> Finding:
        """A finding that passes only if it passes on every rank. Collective."""
        everywhere = all(rank == [1] for rank in _all([int(passed)]))
        return Finding(probe=probe, passed=everywhere, detail=detail)


class _Rows(TorchDispatchMode):
    """Records the largest number of rows of matrix products with one of `widths` columns.

    Products of `hidden_size` rows are not counted: they are gradients of weights.
    """

    def __init__(self, widths: set[int], hidden_size: int) -> None:
        TorchDispatchMode.__init__(self)
        self._widths, self._hidden_size = widths, hidden_size
        self.largest: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        products = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm)
        if func.overloadpacket in products and out.shape[-1] in self._widths:
            width = out.shape[-1]
            rows = out.numel() // width
            if rows != self._hidden_size:
                self.largest[width] = max(self.largest.get(width, 0), rows)
        return out


def _all(values: list[int]) -> list[list[int]]:
    """`values` of every rank, which must have equal lengths. Collective."""
    mine = torch.tensor(values, dtype=torch.int64)
    found = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(found, mine)
    return [rank.tolist() for rank in found]


def stream_hash(tokens: Tensor) -> int:
    """63 bits of the SHA-256 of int64 tokens."""
    digest = hashlib.sha256(tokens.contiguous().numpy().tobytes()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _span(moved: Tensor) -> str:
    places = moved.any(dim=0).nonzero().flatten().tolist()
    return f"{places[0]} to {places[-1]}" if places else "none"
