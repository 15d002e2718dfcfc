"""How an enabled model is shared: its method, its ranks, and the configuration that the method checks."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import DeviceMesh
from transformers import PreTrainedModel

from alst_impl.config import DataConfig, LoraConfig, Spec, TrainConfig
from alst_impl.layout import Layout, make_mesh
from alst_impl.methods.base import Method, check_attends, load_method
from alst_impl.ops.attention.cores.base import load_core

SHARED = ("cp", "sp")
"""Axes of a mesh whose ranks share each sample; also the fields of a method that give their sizes."""
DTYPES = ("float64", "float32", "bfloat16")


@dataclass(frozen=True)
class _Described:
    """A model's configuration as text, with all fields, also those that have the default value of their class."""

    name: str
    text: str

    def check(self, method: Method, config: TrainConfig) -> None:
        """`method.check` of a run with this model. Errors name the model's class."""
        with TemporaryDirectory() as folder:
            path = Path(folder, "config.json")  # where a run finds a model that is not published
            path.write_text(self.text)
            try:
                method.check(config.model_copy(update={"model": str(path)}))
            except ValueError as error:
                raise ValueError(str(error).replace(str(path), self.name)) from None


@dataclass(frozen=True)
class Setting:
    """A method for a model on all ranks of the process group."""

    method: Method
    config: TrainConfig
    """The run as the method checks it. Sizes of batches are not known before the first one."""
    ranks: list[list[int]]
    """Ranks that share each sample, by group."""
    _model: _Described
    _checked: set[tuple[int, bool]] = field(default_factory=set)

    @property
    def name(self) -> str:
        """The method's name."""
        return self.config.method.name

    @property
    def groups(self) -> int:
        """Number of groups of ranks with different samples."""
        return len(self.ranks)

    @property
    def shards(self) -> int:
        """Ranks that share each sample."""
        return len(self.ranks[0])

    @property
    def draws(self) -> bool:
        """Whether masks of dropout have streams of their own; otherwise a rank draws as without us."""
        return self.shards > 1 or self.method.longest_chunk() is not None

    def group_of(self, rank: int) -> int:
        """The group of global rank `rank`."""
        return next(index for index, group in enumerate(self.ranks) if rank in group)

    def passes(self, length: int, limit: int | None) -> int:
        """Number of chunks of samples of `length` tokens. Raises `ValueError` if it is above `limit`. Local."""
        found = self.method.layout(length).passes
        if limit is not None and found > limit:
            raise ValueError(
                f"method '{self.name}' cuts samples of {length} tokens into {found} chunks, each with a call of the model; "
                f"loop over alst.chunks(model, batch), or use a chunk of {length} tokens"
            )
        return found

    def check_layout(self, layout: Layout) -> None:
        """Raise `ValueError` if the method cannot compute whole samples of `layout` exactly. Local."""
        documents = max(map(len, layout.documents), default=1) if layout.documents else 1
        key = (layout.length, documents > 1)
        if key in self._checked:
            return
        data = DataConfig(documents=documents)
        # Unlike a run, a loop may have samples that are shorter than a chunk: they run in one pass.
        seqlen = max(layout.length, self.method.longest_chunk() or 1)
        config = self.config.model_copy(update={"seqlen": seqlen, "data": data})
        self._model.check(self.method, config)
        self._checked.add(key)


def settle(
    model: PreTrainedModel,
    mesh: DeviceMesh | None,
    spec: Spec,
    config: dict[str, Any],
) -> tuple[Setting, DeviceMesh]:
    """The setting of `model` under the method of `spec`, and its mesh. Collective if `mesh` is None.

    `config` holds fields of `TrainConfig`. Raises `ValueError` for what the method cannot do.
    """
    if not dist.is_initialized():
        raise ValueError(
            "enable() found no process group; start the script with torchrun and call "
            "torch.distributed.init_process_group() first (TrainingArguments and Accelerator do)"
        )
    if mesh is not None:
        spec = _with_degrees(mesh, spec)
    method = load_method(spec)
    described = _Described(type(model).__name__, model.config.to_json_string(use_diff=False))
    shards = method.layout(1).shards
    chunk = method.longest_chunk()
    asked = TrainConfig(
        model=described.name,
        method=spec,
        # Enough for any order of the tokens, and for two chunks; batches are checked as they come.
        seqlen=4 * shards if chunk is None else 2 * chunk,
        world_size=dist.get_world_size(),
        dtype=_dtype(model),
        lora=LoraConfig(rank=1) if _has_adapters(model) else None,
        **config,
    )
    _check_calls_the_model(method, spec.name)
    check_attends(asked)
    described.check(method, asked)
    if mesh is None:
        groups = [method.layout(1)] * (dist.get_world_size() // shards)
        mesh = make_mesh(groups, _device_type(model))
    return Setting(method, asked, _ranks(mesh), described), mesh


def _check_calls_the_model(method: Method, name: str) -> None:
    """Raise `ValueError` for a method that a user's loop cannot run by calling the model."""
    schedule = () if method.longest_chunk() else ("forward_backward", "micro_step", "loss")
    own = [
        hook
        for hook in (*schedule, "shard", "mpu")
        if getattr(type(method), hook) is not getattr(Method, hook)
    ]
    if own or method.layout(1).pp > 1:
        raise ValueError(
            f"method '{name}' runs its own schedule or loss, but a loop calls the model; use method 'alst', "
            "'chunked', 'layerwise', 'ring' or 'usp', or `alst run` for the others"
        )


def _with_degrees(mesh: DeviceMesh, spec: Spec) -> Spec:
    """`spec` with the sizes of the mesh's axes. Raises `ValueError` for another axis, size or number of ranks."""
    names = mesh.mesh_dim_names or ()
    if set(names) - {"dp", *SHARED}:
        raise ValueError(
            f"mesh has the axes {list(names)}; use dp (ranks with different samples) and sp or cp (ranks that share "
            "each sample), or leave the mesh out: enable(model, sp=...)"
        )
    if mesh.size() != dist.get_world_size():
        raise ValueError(
            f"mesh has {mesh.size()} of {dist.get_world_size()} ranks; use a mesh of all ranks"
        )
    sizes = {axis: mesh[axis].size() if axis in names else 1 for axis in SHARED}
    for axis, size in sizes.items():
        asked = spec.options.get(axis, size)
        if asked != size:
            raise ValueError(
                f"{axis} ({asked}) is not the size of the mesh's axis {axis} ({size}); leave {axis} out, "
                "or leave the mesh out"
            )
    degrees = {axis: size for axis, size in sizes.items() if size > 1}
    return Spec(name=spec.name, options={**spec.options, **degrees})


def _ranks(mesh: DeviceMesh) -> list[list[int]]:
    """Ranks that share each sample, `cp` before `sp`, by place along `dp`."""
    names = list(mesh.mesh_dim_names or ())
    order = [names.index(axis) for axis in ("dp", *SHARED) if axis in names]
    places = mesh.mesh.permute(order)
    groups: list[list[int]] = places.reshape(places.shape[0] if "dp" in names else 1, -1).tolist()
    return groups


def _dtype(model: PreTrainedModel) -> str:
    name = str(model.dtype).removeprefix("torch.")
    return name if name in DTYPES else "float32"


def _has_adapters(model: PreTrainedModel) -> bool:
    return any(".lora_" in name for name, _ in model.named_parameters())


def device_of(model: PreTrainedModel, mesh: DeviceMesh) -> torch.device:
    """The device that computes: the model's, or this process's one if an engine will move the model there."""
    held = next(model.parameters()).device
    if held.type not in ("cpu", "meta"):
        return held
    if mesh.device_type == "cpu":
        return torch.device("cpu")
    return torch.device(mesh.device_type, torch.accelerator.current_device_index())


def check_attention(spec: Spec, device: torch.device) -> None:
    """Raise `ValueError` if the core attention does not run on `device`, or if it lacks a package."""
    core = load_core(spec)
    if device.type == "cpu" and not core.cpu:
        raise ValueError(
            f"attention '{spec}' needs a CUDA device, but the model computes on {device}; use attention='sdpa'"
        )
    message = core.missing()
    if message is not None:
        raise ValueError(message)


def _device_type(model: PreTrainedModel) -> str:
    held = next(model.parameters()).device.type
    if held not in ("cpu", "meta"):
        return held
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if accelerator is None or dist.get_backend() == "gloo" else accelerator.type
