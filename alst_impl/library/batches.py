"""Reads what a collator makes: masks, positions and packed documents.

Legend: B batch, S sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from alst_impl.data import Batch
from alst_impl.layout import IGNORE_INDEX, Documents, Layout

OFFSETS = ("cu_seq_lens_q", "cu_seq_lens_k")
"""Offsets of packed documents, as transformers' flash attention takes them."""
LONGEST = ("max_length_q", "max_length_k")
"""Tokens of the longest document, which follow from the offsets."""
KNOWN = (
    "input_ids",
    "labels",
    "attention_mask",
    "position_ids",
    *OFFSETS,
    *LONGEST,
    "seq_idx",
)
"""Keys of a batch that are understood."""


def read(batch: Mapping[str, Any]) -> Batch:
    """A collator's `batch` of whole samples, on the CPU, with shifted labels and its documents. Local.

    Takes int64 tensors [B, S]: `input_ids`, `labels` (not shifted), and if present `attention_mask` (ones, then
    zeros) and `position_ids`; of one flattened sample also `cu_seq_lens_q` and `cu_seq_lens_k` (int32 [N + 1]) and
    `seq_idx` (int32 [1, S]), which numbers its documents.
    Raises `ValueError` for what cannot be exact, and for any other key.
    """
    given = {key: value for key, value in batch.items() if value is not None}
    for key, value in given.items():
        if key not in KNOWN:
            raise ValueError(
                f"batch['{key}'] is unknown to alst.shard(batch), which takes {', '.join(KNOWN)}; leave it out of "
                "the batch if the model computes the same without it"
            )
        if key not in LONGEST:
            _check_tensor(key, value)
    ids, labels = (_tokens(given, key) for key in ("input_ids", "labels"))
    padded = _padding(given.get("attention_mask"), ids, labels)
    positions = _positions(given, ids, padded)
    documents = _documents(given, positions)
    _check_numbers(given.get("seq_idx"), ids, documents)
    return Batch(
        input_ids=ids,
        shift_labels=shifted(labels),
        position_ids=positions,
        layout=Layout(ids.shape[1], documents=documents),
    )


def labels_of(batch: Mapping[str, Any]) -> Tensor:
    """The labels of a collator's batch, not shifted. Raises `ValueError` if it has none."""
    labels: Tensor | None = batch.get("labels")
    if labels is None:
        raise ValueError("batch has no 'labels'; a step is divided by their number")
    _check_tensor("labels", labels)
    return labels


def shifted(labels: Tensor) -> Tensor:
    """The label of each position: `labels` [B, S] one place to the left, as a causal model's loss shifts them."""
    return torch.nn.functional.pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:].contiguous()


def check_tokens(model: PreTrainedModel, batch: Mapping[str, Any]) -> None:
    """Raise `ValueError` for an id or a label, int64 [B, S] each, that is not a token of the model. Local."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    labels = batch["labels"][:, 1:]  # nothing predicts the first token
    counted = labels.masked_fill(labels == IGNORE_INDEX, 0)
    _check_rows("input_ids", batch["input_ids"], getattr(embedding, "num_embeddings", None))
    _check_rows("labels", counted, getattr(head, "out_features", None))


def _check_rows(name: str, tokens: Tensor, rows: int | None) -> None:
    """Raise `ValueError` if one of `tokens`, int64 of any shape, is not among the model's `rows`, if these are known.

    One rank would fail inside the model, and the others would wait for it.
    """
    if rows is None:
        return
    beyond = (tokens < 0) | (tokens >= rows)
    if beyond.any():
        raise ValueError(
            f"batch['{name}'] has {int(tokens[beyond][0])}, but the model has the tokens 0 to {rows - 1}; use its own "
            f"tokenizer, and {IGNORE_INDEX} for labels that do not count"
        )


def _check_tensor(key: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(
            f"batch['{key}'] is of type {type(value).__name__}, not a tensor; let the collator make tensors "
            "(return_tensors='pt')"
        )


def _tokens(given: dict[str, Any], key: str) -> Tensor:
    if key not in given:
        raise ValueError(f"batch has no '{key}'; alst.shard(batch) needs input_ids and labels")
    found: Tensor = given[key].cpu()
    if found.dim() != 2 or found.shape != given["input_ids"].shape:
        raise ValueError(
            f"batch['{key}'] has shape {list(found.shape)}, beside input_ids of {list(given['input_ids'].shape)}; "
            "both are [batch, sequence]"
        )
    if found.numel() == 0:
        raise ValueError(
            f"batch['{key}'] of shape {list(found.shape)} has no token; leave the sample out"
        )
    return found


def _padding(mask: Tensor | None, ids: Tensor, labels: Tensor) -> Tensor | None:
    """Which tokens are right padding, bool [B, S]; None if none is.

    A causal model's real tokens never see padding to their right, so the mask itself is not needed.
    """
    if mask is None:
        return None
    mask = mask.cpu()
    if mask.shape != ids.shape or bool(((mask != 0) & (mask != 1)).any()):
        raise ValueError(
            f"attention_mask of shape {list(mask.shape)} is not a padding mask of zeros and ones, {list(ids.shape)}; "
            "attention here is causal, and documents are told apart by position_ids or cu_seq_lens_q"
        )
    padded = mask == 0
    if bool((padded[:, :-1] & ~padded[:, 1:]).any()):
        raise ValueError(
            "attention_mask has zeros left of tokens: a causal kernel without a mask would attend to them; pad "
            "right (tokenizer.padding_side = 'right')"
        )
    if bool((labels[padded] != IGNORE_INDEX).any()):
        raise ValueError(
            f"labels of padded tokens are not {IGNORE_INDEX}, so the loss would train on padding; set "
            "labels[attention_mask == 0] = -100"
        )
    return padded if bool(padded.any()) else None


def _positions(given: dict[str, Any], ids: Tensor, padded: Tensor | None) -> Tensor:
    """Position of each token, int64 [B, S], counted on through right padding."""
    rising = torch.arange(ids.shape[1]).expand_as(ids)
    positions = given.get("position_ids")
    if positions is None:
        return rising
    if positions.dim() != 2 or positions.shape[1] != ids.shape[1]:
        raise ValueError(
            f"position_ids of shape {list(positions.shape)} are not one position for each of {list(ids.shape)} "
            "tokens; several rotary axes are not supported"
        )
    positions = positions.cpu().expand_as(ids)
    if padded is not None:
        last = torch.where(padded, 0, rising).amax(1, keepdim=True)
        positions = torch.where(padded, positions.gather(1, last) + rising - last, positions)
    if "attention_mask" in given and bool((positions.diff(dim=1) != 1).any()):
        raise ValueError(
            "position_ids restart beside an attention_mask, where transformers lets documents attend to each other; "
            "leave attention_mask out of the batch to keep documents apart"
        )
    return positions


def _documents(given: dict[str, Any], positions: Tensor) -> Documents | None:
    """Lengths of the packed documents of each sample; None if each sample is one document."""
    by_position = [_runs(row.diff() != 1) for row in positions]
    offsets = [given[key].cpu().long() for key in OFFSETS if key in given]
    if not offsets:
        return tuple(by_position) if max(map(len, by_position), default=1) > 1 else None
    first, *others = offsets
    size, lengths = positions.shape, first.diff()
    if (
        size[0] != 1
        or any(not torch.equal(first, other) for other in others)
        or first.dim() != 1
        or int(first[0]) != 0
        or int(first[-1]) != size[1]
        or bool((lengths < 0).any())
    ):
        raise ValueError(
            f"cu_seq_lens_q and cu_seq_lens_k are not the same rising offsets from 0 to {size[1]} of one flattened "
            f"sample, beside input_ids of {list(size)}; use DataCollatorWithFlattening, or position_ids alone"
        )
    found = tuple(int(n) for n in lengths if n)
    if len(by_position[0]) > 1 and by_position[0] != found:
        raise ValueError(
            f"position_ids restart after documents of {list(by_position[0])} tokens, but cu_seq_lens_q says "
            f"{list(found)}; pass one of them"
        )
    return (found,) if len(found) > 1 else None


def _check_numbers(numbers: Tensor | None, ids: Tensor, documents: Documents | None) -> None:
    """Raise `ValueError` unless `numbers`, int [B, S], if present, change where `documents` do.

    Convolutions and scans keep documents apart by them, where attention does by positions.
    """
    if numbers is None:
        return
    found = tuple(_runs(row.diff() != 0) for row in numbers.cpu())
    told = documents or ((ids.shape[1],),) * ids.shape[0]
    if found != told:
        raise ValueError(
            f"seq_idx numbers documents of {[list(row) for row in found]} tokens, but position_ids and cu_seq_lens_q tell "
            f"of {[list(row) for row in told]}; leave seq_idx out, or make them agree"
        )


def _runs(breaks: Tensor) -> tuple[int, ...]:
    """Lengths of the runs of S tokens between `breaks`, bool [S - 1]. transformers sees documents in such runs."""
    bounds = [0, *(breaks.nonzero().flatten() + 1).tolist(), len(breaks) + 1]
    return tuple(stop - start for start, stop in pairwise(bounds))
