"""Attention over a split sequence on every rank of a pool's world, against dense float64 on one."""

from dataclasses import dataclass
from typing import Any

import torch

from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnBackend, AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

BATCH, HEADS, WIDTH = 2, 4, 8


@dataclass(frozen=True)
class Case:
    """One attention; ``chunk`` is the length of one of the 2*CP chunks, ``spread`` the size of operands."""

    kind: str = "p2p"
    causal: bool = True
    window: tuple[int, int] | None = None
    groups: int = HEADS
    layout: str = "SBH"
    backend: str = "fused"
    dtype: str = "float32"
    chunk: int = 3
    value_width: int = WIDTH
    mask: str | None = None
    hierarchy: tuple[int, int] | None = None
    layer_number: int = 1
    spread: float = 2.0
    config: tuple[tuple[str, Any], ...] = ()


def build(case: Case, size: int, **extra: Any) -> DotProductAttention:
    config = TransformerConfig(
        num_layers=4,
        hidden_size=HEADS * WIDTH,
        num_attention_heads=HEADS,
        num_query_groups=case.groups,
        attention_dropout=0.0,
        attention_backend=AttnBackend[case.backend],
        attention_layout=case.layout,
        window_size=case.window,
        context_parallel_size=size,
        hierarchical_context_parallel_sizes=list(case.hierarchy) if case.hierarchy else None,
        cp_comm_type=case.kind,
        **{**dict(case.config), **extra},
    )
    mask_type = AttnMaskType.causal if case.causal else AttnMaskType.padding
    return DotProductAttention(config, case.layer_number, mask_type, "self")


def start(size: int, hierarchy: tuple[int, int] | None = None) -> int:
    """Groups of one sequence over all ranks; returns this rank's place in it."""
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        context_parallel_size=size,
        hierarchical_context_parallel_sizes=list(hierarchy) if hierarchy else None,
        create_gloo_process_groups=False,
    )
    model_parallel_cuda_manual_seed(7)
    return parallel_state.get_context_parallel_rank()


def operands(case: Case, size: int) -> tuple[torch.Tensor, ...]:
    """Query, key, value and the result's gradient for the whole sequence."""
    generator = torch.Generator().manual_seed(5)
    length = 2 * size * case.chunk
    shapes = (
        (HEADS, WIDTH),
        (case.groups, WIDTH),
        (case.groups, case.value_width),
    )
    dtype = getattr(torch, case.dtype)
    q, k, v = (
        (case.spread * torch.randn(length, BATCH, *shape, generator=generator)).to(dtype) for shape in shapes
    )
    return q, k, v, torch.randn(length, BATCH, HEADS * case.value_width, generator=generator).to(dtype)


def part(t: torch.Tensor, rank: int, size: int, dim: int = 0) -> torch.Tensor:
    """Chunks rank and 2*size - 1 - rank, by hand."""
    chunks = t.chunk(2 * size, dim)
    return torch.cat((chunks[rank], chunks[2 * size - 1 - rank]), dim)


def document_mask(length: int) -> torch.Tensor:
    """[b, 1, s, s], True hides: documents do not see each other, and neither what comes later."""
    starts = ([0, length // 3, length // 2 + 1], [0, length - 2])
    documents = torch.zeros(BATCH, length, dtype=torch.long)
    for row, firsts in zip(documents, starts, strict=True):
        for first in firsts[1:]:
            row[first:] += 1
    other = documents[:, :, None] != documents[:, None, :]
    return (other | torch.ones(length, length, dtype=torch.bool).triu(1))[:, None]


def hidden_keys(case: Case, length: int) -> torch.Tensor:
    """[b or 1, 1, s, s] by the rules."""
    left, right = case.window or (-1, -1)
    ahead = (torch.arange(length)[None, :] - torch.arange(length)[:, None])[None, None]
    hidden = torch.zeros(1, 1, length, length, dtype=torch.bool)
    if case.causal:
        hidden |= ahead > 0
    if left >= 0:
        hidden |= -ahead > left
    if right >= 0:
        hidden |= ahead > right
    return hidden | document_mask(length) if case.mask else hidden


def dense(q, k, v, hidden, keep=None, cap=None):
    """[s, b, n, d] -> [s, b, n*dv] by the definition; ``keep`` [b, n, s, s] multiplies the weights, scores
    go through ``cap * tanh(score / cap)``.
    """
    repeat = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(repeat, 2), v.repeat_interleave(repeat, 2)
    scores = torch.einsum("qbnd,kbnd->bnqk", q, k) * q.shape[-1] ** -0.5
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    weights = torch.softmax(scores.masked_fill(hidden, -1e30), -1)
    if keep is not None:
        weights = weights * keep
    return torch.einsum("bnqk,kbnd->qbnd", weights, v).flatten(2)


def reference(case: Case, size: int, keep: torch.Tensor | None = None) -> list[torch.Tensor]:
    """Output and gradients of the whole sequence in float64."""
    q, k, v, grad = (t.double().requires_grad_() for t in operands(case, size))
    cap = dict(case.config).get("attn_logit_softcapping")
    out = dense(q, k, v, hidden_keys(case, q.shape[0]), keep, cap)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad.detach())]


def split_run(case: Case, rank: int, size: int, layer: DotProductAttention) -> list[torch.Tensor]:
    """Output and gradients of this rank's part."""
    *inputs, grad = (part(t, rank, size) for t in operands(case, size))
    inputs = [t.requires_grad_() for t in inputs]
    length = 2 * size * case.chunk
    mask = part(document_mask(length), rank, size, dim=2) if case.mask else None
    out = layer(*inputs, mask)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


def worst_errors(cases: list[Case]) -> list[list[float]]:
    """Runs on a rank: per case the largest errors of output, dq, dk and dv, over the largest value or 1."""
    size = torch.distributed.get_world_size()
    found, hierarchy = [], "none yet"
    for case in cases:
        if case.hierarchy != hierarchy:
            hierarchy = case.hierarchy
            rank = start(size, hierarchy)
        wanted = reference(case, size)
        got = split_run(case, rank, size, build(case, size))
        errors = []
        for g, w in zip(got, wanted, strict=True):
            assert g.dtype == getattr(torch, case.dtype)
            mine = part(w, rank, size)
            assert g.shape == mine.shape
            errors.append(float((g.double() - mine).abs().max() / max(1.0, w.abs().max())))
        found.append(errors)
    return found
