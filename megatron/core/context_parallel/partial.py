"""What one attention over a split sequence computes, besides its operands."""

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron.core.context_parallel.plan import Task
from megatron.core.fusions.attention_masks import Band
from megatron.core.fusions.block_attention import (
    NOTHING_VISIBLE,
    block_attention,
    block_attention_backward,
    merge_attention,
)


@dataclass(frozen=True)
class SplitAttention:
    """Settings of one call.

    Attributes:
        band: visible part of the whole score matrix.
        attention_mask: this rank's queries against all keys, [b or 1, 1, s_local, s], True masks; or None.
        softmax_scale: factor in front of the scores.
        dropout_p: probability of dropping a weight.
        seed: of this rank's dropout masks.
        softcap: c turns scaled scores x into ``c * tanh(x / c)``; or None.
    """

    band: Band
    attention_mask: Tensor | None
    softmax_scale: float
    dropout_p: float
    seed: int
    softcap: float | None = None

    def block_arguments(self, task: Task) -> dict[str, Any]:
        """Keyword arguments of the block functions for ``task``; the same in forward and backward."""
        mask = self.attention_mask
        if mask is not None:
            # Blocks are not joined when there is a mask, so their keys are neighbours in the sequence.
            length = task.keys.stop - task.keys.start
            mask = mask[:, :, task.queries, task.key_position : task.key_position + length]
        return {
            "band": task.band,
            "attention_mask": mask,
            "softmax_scale": self.softmax_scale,
            "dropout_p": self.dropout_p,
            "dropout_seed": mixed_seed(self.seed, task.query_position, task.key_position),
            "softcap": self.softcap,
        }


def mixed_seed(*parts: int) -> int:
    """A 62-bit number that differs, for all practical purposes, wherever ``parts`` do."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2


class PartialAttention:
    """The result so far: attention over the keys seen up to now."""

    def __init__(self, query: Tensor, value: Tensor):
        self.rows, self.batch, self.heads, _ = query.shape
        self.width = value.shape[-1]
        self.wide = torch.promote_types(query.dtype, torch.float32)
        self.out: Tensor | None = None
        self.lse: Tensor | None = None

    def add(self, rows: slice, out: Tensor, lse: Tensor) -> None:
        """Takes in one block: out [rows, b, n, dv], lse [b, n, rows]."""
        if self.out is None or self.lse is None:
            if rows.stop - rows.start == self.rows:
                self.out, self.lse = out.to(self.wide), lse
                return
            shape = (self.rows, self.batch, self.heads)
            self.out = torch.zeros(*shape, self.width, dtype=self.wide, device=out.device)
            # [b, n, s]
            self.lse = lse.new_full((self.batch, self.heads, self.rows), NOTHING_VISIBLE)
        # Rows are a slice of the slowest dimension: contiguous.
        merged, merged_lse = merge_attention(self.out[rows], self.lse[..., rows], out, lse)
        if merged.data_ptr() != self.out[rows].data_ptr():
            self.out[rows] = merged
        self.lse[..., rows] = merged_lse

    def result(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Output [s, b, n, dv] in ``dtype`` and log-sum-exp [b, n, s]; every query has seen a block."""
        assert self.out is not None and self.lse is not None, "no block was visible"
        return self.out.to(dtype), self.lse


def add_blocks(
    partial: PartialAttention,
    tasks: tuple[Task, ...],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spec: SplitAttention,
) -> None:
    """Computes ``tasks`` and takes them in.  query [s, b, n, d], key and value [sk, b, g, d]"""
    for task in tasks:
        arguments = spec.block_arguments(task)
        out, lse = block_attention(query[task.queries], key[task.keys], value[task.keys], **arguments)
        partial.add(task.queries, out, lse)


@dataclass
class SavedAttention:
    """What backward needs: this rank's queries, the merged result, and its gradient."""

    query: Tensor
    out: Tensor
    lse: Tensor
    grad_out: Tensor

    def add_gradients(
        self,
        tasks: tuple[Task, ...],
        key: Tensor,
        value: Tensor,
        spec: SplitAttention,
        grads: tuple[Tensor, Tensor, Tensor],
    ) -> None:
        """Adds the shares of ``tasks`` to the gradients of the queries and of these keys and values."""
        grad_q, grad_k, grad_v = grads
        for task in tasks:
            rows, columns = task.queries, task.keys
            dq, dk, dv = block_attention_backward(
                self.grad_out[rows],
                self.query[rows],
                key[columns],
                value[columns],
                self.out[rows],
                self.lse[..., rows],
                **spec.block_arguments(task),
            )
            grad_q[rows] += dq
            grad_k[columns] += dk
            grad_v[columns] += dv


class Packed:
    """Keys and values in one buffer, so that they travel in one message."""

    def __init__(self, key: Tensor, value: Tensor):
        self.shapes = (key.shape, value.shape)
        self.sizes = (key.numel(), value.numel())

    def pack(self, key: Tensor, value: Tensor) -> Tensor:
        """[sk, b, g, d] and [sk, b, g, dv] -> flat"""
        return torch.cat((key.reshape(-1), value.reshape(-1)))

    def unpack(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """Views of a flat buffer; of [size, flat] with the leading dimension kept."""
        key, value = flat.split(self.sizes, dim=-1)
        lead = flat.shape[:-1]
        return key.view(*lead, *self.shapes[0]), value.view(*lead, *self.shapes[1])
