"""Fused attention, its backward, and the merging of two parts; scaled masked softmax."""

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_npu.virtual.kernels import kernel

OPEN = 2147483647
COPIES = 8
_Window = tuple[int, Tensor | None, int, int]


class Shape(NamedTuple):
    """What the operators compute besides their operands."""

    layout: str
    heads: int
    scale: float
    keep_prob: float
    masked: Tensor | None
    zero_fully_masked_rows: bool
    generator: tuple[int, int]


def to_bnsd(t: Tensor, layout: str, heads: int) -> Tensor:
    """Any dense layout -> [b, n, s, d]."""
    if layout == "SBH":
        s, b, h = t.shape
        return t.reshape(s, b, heads, h // heads).permute(1, 2, 0, 3)
    if layout == "BSH":
        b, s, h = t.shape
        return t.reshape(b, s, heads, h // heads).permute(0, 2, 1, 3)
    if layout == "BSND":
        return t.permute(0, 2, 1, 3)
    assert layout == "BNSD", f"layout {layout}"
    return t


def from_bnsd(t: Tensor, layout: str) -> Tensor:
    """[b, n, s, d] -> the layout."""
    if layout == "SBH":
        return t.permute(2, 0, 1, 3).reshape(t.shape[2], t.shape[0], -1)
    if layout == "BSH":
        return t.permute(0, 2, 1, 3).reshape(t.shape[0], t.shape[2], -1)
    return t.permute(0, 2, 1, 3).contiguous() if layout == "BSND" else t.contiguous()


def groups_of(query: Tensor, key: Tensor, layout: str, heads: int) -> int:
    """Heads of the keys, which the operator finds from the widths."""
    if layout in ("SBH", "BSH"):
        return key.shape[2] // (query.shape[2] // heads)
    return key.shape[1] if layout in ("BNSD", "TND") else key.shape[2]


def masked_scores(
    mode: int, mask: Tensor | None, pre: int, following: int, size: tuple[int, int, int, int]
) -> Tensor | None:
    """True where a score is masked; None if nothing is, whatever the mode, because there is no mask."""
    b, n, sq, sk = size
    if mask is None:
        return None
    assert mask.dtype in (torch.bool, torch.uint8), f"mask of {mask.dtype}"
    row, column, shift = torch.arange(sq).view(-1, 1), torch.arange(sk).view(1, -1), sk - sq
    if mode in (0, 1):
        allowed = [(sq, sk), (1, 1, sq, sk), (b, 1, sq, sk), (b, n, sq, sk)]
        assert tuple(mask.shape) in allowed, f"mask {tuple(mask.shape)} for scores {size}"
        if mode == 1:
            return mask.bool()
        _check_signs(pre, following, sq, sk)
        outside = (column < row - pre) | (column > row + following)
        assert bool(mask.bool()[..., outside].all()), "the mask leaves out what the window masks"
        return mask.bool() | outside
    assert mask.shape == (2048, 2048), f"compressed mask {tuple(mask.shape)}"
    assert torch.equal(mask.bool(), torch.ones(2048, 2048).triu(1).bool()), "compressed mask is no triangle"
    if mode == 2:
        return column > row
    if mode == 3:
        assert sk >= sq, "mode 3 with more queries than keys"
        return column > row + shift
    assert mode == 4, f"sparse mode {mode}"
    _check_signs(pre, following, sq, sk)
    return (column < row + shift - pre) | (column > row + shift + following)


def _check_signs(pre: int, following: int, sq: int, sk: int) -> None:
    if following < 0:
        assert pre >= -following and -following < sk, f"window {pre}, {following} of {sq} x {sk}"
    if pre < 0:
        assert following >= -pre and -pre < sq, f"window {pre}, {following} of {sq} x {sk}"


def _kept(scores: Tensor, shape: Shape) -> Tensor:
    """1 / keep_prob or 0, the same for the same seed and offset."""
    seed, offset = shape.generator
    generator = torch.Generator().manual_seed((seed * 1000003 + offset) % (1 << 62))
    keep = torch.rand(scores.shape, generator=generator) < shape.keep_prob
    return keep.to(scores.dtype) / shape.keep_prob


def _scores(q: Tensor, k: Tensor, shape: Shape) -> Tensor:
    scores = torch.einsum("bnid,bnjd->bnij", q, k) * shape.scale
    return scores if shape.masked is None else scores.masked_fill(shape.masked, -torch.inf)


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


def dense_forward(q: Tensor, k: Tensor, v: Tensor, shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """[b, n, s, d] operands -> output, row maximum, row sum, all wide."""
    repeat = q.shape[1] // k.shape[1]
    q, k, v = _wide(q), _wide(k).repeat_interleave(repeat, 1), _wide(v).repeat_interleave(repeat, 1)
    scores = _scores(q, k, shape)
    largest = scores.max(-1, keepdim=True).values
    fully_masked = torch.isneginf(largest)
    weights = (scores - largest.masked_fill(fully_masked, 0.0)).exp()
    total = weights.sum(-1, keepdim=True)
    probabilities = weights / total
    if shape.keep_prob < 1.0:
        probabilities = probabilities * _kept(scores, shape)
    out = torch.einsum("bnij,bnjd->bnid", probabilities, v)
    # Rows that see nothing are zero at the precision that promises it, and undefined otherwise.
    out = out.masked_fill(fully_masked, 0.0 if shape.zero_fully_masked_rows else torch.nan)
    return out, largest.masked_fill(fully_masked, torch.nan), total.masked_fill(fully_masked, torch.nan)


def dense_backward(
    operands: tuple[Tensor, Tensor, Tensor],
    out: Tensor,
    grad: Tensor,
    largest: Tensor,
    total: Tensor,
    shape: Shape,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients from the statistics, which need not be of these keys alone."""
    q, k, v = operands
    b, groups, repeat = k.shape[0], k.shape[1], q.shape[1] // k.shape[1]
    q, k, v = _wide(q), _wide(k).repeat_interleave(repeat, 1), _wide(v).repeat_interleave(repeat, 1)
    out, grad = _wide(out), _wide(grad)
    scores = _scores(q, k, shape)
    probabilities = (scores - largest).exp() / total
    if shape.masked is not None:
        fully_masked = shape.masked.all(-1, keepdim=True)
        probabilities = probabilities.masked_fill(
            fully_masked, 0.0 if shape.zero_fully_masked_rows else torch.nan
        )
    kept = _kept(scores, shape) if shape.keep_prob < 1.0 else torch.ones(())
    dv = torch.einsum("bnij,bnid->bnjd", probabilities * kept, grad)
    slope = torch.einsum("bnid,bnjd->bnij", grad, v) * kept
    dscores = probabilities * (slope - (grad * out).sum(-1, keepdim=True)) * shape.scale
    dq = torch.einsum("bnij,bnjd->bnid", dscores, k)
    dk = torch.einsum("bnij,bnid->bnjd", dscores, q)
    dk, dv = (t.reshape(b, groups, repeat, *t.shape[2:]).sum(2) for t in (dk, dv))
    return dq, dk, dv


class Draw:
    """The device's generator: every call with dropout moves it by ten."""

    offset = 0

    @classmethod
    def next(cls, keep_prob: float) -> tuple[int, int]:
        if keep_prob == 1.0:
            return 0, 0
        cls.offset += 10
        return torch.initial_seed() % (1 << 31), cls.offset - 10


def _spans(ends: list[int]) -> list[slice]:
    return [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True) if end > start]


def _statistics(t: Tensor) -> Tensor:
    """[b, n, s, 1] -> [b, n, s, 8] in fp32."""
    return t.float().expand(*t.shape[:-1], COPIES).contiguous()


@kernel("npu_fusion_attention")
def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_num: int,
    input_layout: str,
    pse: Any = None,
    padding_mask: Any = None,
    atten_mask: Tensor | None = None,
    scale: float = 1.0,
    keep_prob: float = 1.0,
    pre_tockens: int = OPEN,
    next_tockens: int = OPEN,
    inner_precise: int = 0,
    prefix: Any = None,
    actual_seq_qlen: list[int] | None = None,
    actual_seq_kvlen: list[int] | None = None,
    sparse_mode: int = 0,
    gen_mask_parallel: bool = True,
    sync: bool = False,
    softmax_layout: str = "",
    sink: Any = None,
    dropout_mask: Any = None,
    seed: int = 0,
    offset: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, int, int, int]:
    assert pse is None and padding_mask is None and prefix is None and sink is None
    assert query.dtype == key.dtype == value.dtype and 0.0 < keep_prob <= 1.0
    drawn = Draw.next(keep_prob)
    window = (sparse_mode, atten_mask, pre_tockens, next_tockens)
    basis = (input_layout, head_num, scale, keep_prob, inner_precise == 2, drawn)
    if input_layout == "TND":
        assert actual_seq_qlen is not None and actual_seq_kvlen is not None
        out, largest, total = _packed_forward(
            query, key, value, actual_seq_qlen, actual_seq_kvlen, window, basis
        )
        return out, largest, total, query.new_empty(0), *drawn, 0
    groups = groups_of(query, key, input_layout, head_num)
    q, k, v = (to_bnsd(t, input_layout, n) for t, n in ((query, head_num), (key, groups), (value, groups)))
    out, largest, total = dense_forward(q, k, v, _shape(q, k, window, basis))
    result = from_bnsd(out, input_layout).to(query.dtype)
    return result, _statistics(largest), _statistics(total), query.new_empty(0), *drawn, 0


def _shape(q: Tensor, k: Tensor, window: _Window, basis: tuple, generator_step: int = 0) -> Shape:
    layout, heads, scale, keep_prob, zero_fully_masked_rows, (seed, offset) = basis
    masked = masked_scores(*window, (q.shape[0], q.shape[1], q.shape[2], k.shape[2]))
    return Shape(
        layout, heads, scale, keep_prob, masked, zero_fully_masked_rows, (seed, offset + generator_step)
    )


def _one(t: Tensor, span: slice) -> Tensor:
    """A document of [t, n, d] -> [1, n, s, d]."""
    return t[span].transpose(0, 1).unsqueeze(0)


def _own_mask(window: tuple, sq: int, sk: int) -> tuple:
    """Modes 0 and 1 take a mask of the longest document; each uses its corner."""
    mode, mask, *limits = window
    return (mode, mask[:sq, :sk] if mask is not None and mode < 2 else mask, *limits)


def _packed_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    q_ends: list[int],
    k_ends: list[int],
    window: tuple,
    basis: tuple,
) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics lie document by document, heads before tokens, under the shape [t, n, 8]."""
    tokens, heads, _ = query.shape
    out = query.new_zeros(tokens, heads, value.shape[-1])
    largest, total = torch.zeros(tokens * heads), torch.zeros(tokens * heads)
    for number, (rows, keys) in enumerate(zip(_spans(q_ends), _spans(k_ends), strict=True)):
        q, k, v = _one(query, rows), _one(key, keys), _one(value, keys)
        own = _own_mask(window, q.shape[2], k.shape[2])
        o, m, z = dense_forward(q, k, v, _shape(q, k, own, basis, number))
        out[rows] = o[0].transpose(0, 1).to(out.dtype)
        places = slice(rows.start * heads, rows.stop * heads)
        largest[places], total[places] = m.flatten().float(), z.flatten().float()
    largest, total = (t.view(tokens, heads, 1).repeat(1, 1, COPIES) for t in (largest, total))
    return out, largest, total


@kernel("npu_fusion_attention_grad")
def backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dy: Tensor,
    head_num: int,
    input_layout: str,
    *,
    pse: Any = None,
    padding_mask: Any = None,
    atten_mask: Tensor | None = None,
    softmax_max: Tensor,
    softmax_sum: Tensor,
    softmax_in: Any = None,
    attention_in: Tensor,
    scale_value: float = 1.0,
    keep_prob: float = 1.0,
    pre_tockens: int = OPEN,
    next_tockens: int = OPEN,
    inner_precise: int = 0,
    seed: int = 0,
    offset: int = 0,
    numels: int = 0,
    prefix: Any = None,
    actual_seq_qlen: list[int] | None = None,
    actual_seq_kvlen: list[int] | None = None,
    sparse_mode: int = 0,
    gen_mask_parallel: bool = True,
    sync: bool = False,
    softmax_layout: str = "",
    sink: Any = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    assert query.dtype == key.dtype == value.dtype == dy.dtype == attention_in.dtype
    assert softmax_max.dtype == softmax_sum.dtype == torch.float32 and softmax_max.shape[-1] == COPIES
    window = (sparse_mode, atten_mask, pre_tockens, next_tockens)
    basis = (input_layout, head_num, scale_value, keep_prob, inner_precise == 2, (seed, offset))
    nothing = query.new_empty(0), torch.empty(0)
    if input_layout == "TND":
        ends = (actual_seq_qlen, actual_seq_kvlen)
        operands = (query, key, value, attention_in, dy)
        return *_packed_backward(operands, (softmax_max, softmax_sum), ends, window, basis), *nothing
    groups = groups_of(query, key, input_layout, head_num)
    q, out, grad = (to_bnsd(t, input_layout, head_num) for t in (query, attention_in, dy))
    k, v = (to_bnsd(t, input_layout, groups) for t in (key, value))
    shape = _shape(q, k, window, basis)
    grads = dense_backward((q, k, v), out, grad, softmax_max[..., :1], softmax_sum[..., :1], shape)
    dq, dk, dv = (from_bnsd(t, input_layout).to(query.dtype) for t in grads)
    return dq, dk, dv, *nothing


def _packed_backward(
    operands: tuple[Tensor, ...],
    statistics: tuple[Tensor, Tensor],
    ends: tuple,
    window: _Window,
    basis: tuple,
) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value, out, grad = operands
    heads = query.shape[1]
    results = [torch.zeros_like(t) for t in (query, key, value)]
    flat = [t.reshape(-1, COPIES)[:, 0] for t in statistics]
    for number, (rows, keys) in enumerate(zip(*(_spans(e) for e in ends), strict=True)):
        q, k, v = _one(query, rows), _one(key, keys), _one(value, keys)
        own = _own_mask(window, q.shape[2], k.shape[2])
        places = slice(rows.start * heads, rows.stop * heads)
        largest, total = (t[places].view(1, heads, -1, 1) for t in flat)
        parts = dense_backward(
            (q, k, v), _one(out, rows), _one(grad, rows), largest, total, _shape(q, k, own, basis, number)
        )
        for result, part, span in zip(results, parts, (rows, keys, keys), strict=True):
            result[span] = part[0].transpose(0, 1).to(result.dtype)
    grad_q, grad_k, grad_v = results
    return grad_q, grad_k, grad_v


def _with_lengths(function: Any, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name; the third version's lengths of documents are tensors, in host memory."""
    named = inspect.signature(function).bind(*args, **kwargs).arguments
    for name in named.keys() & {"actual_seq_qlen", "actual_seq_kvlen"}:
        if named[name] is not None:
            named[name] = named[name].tolist()
    return named


@kernel("npu_fusion_attention_v3")
def forward_v3(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    """As the first, but what was drawn comes in two tensors; torch's attention on an NPU calls this one."""
    *tensors, seed, offset, _ = forward(**_with_lengths(forward, args, kwargs))
    return *tensors, torch.tensor([seed]), torch.tensor([offset])


@kernel("npu_fusion_attention_grad_v3")
def backward_v3(*args: Any, seed: Tensor, offset: Tensor, **kwargs: Any) -> tuple[Tensor, ...]:
    drawn = {"seed": int(seed), "offset": int(offset)}
    return backward(**_with_lengths(backward, args, kwargs | drawn))


@kernel("npu_ring_attention_update")
def merge(
    prev_attn_out: Tensor,
    prev_softmax_max: Tensor,
    prev_softmax_sum: Tensor,
    cur_attn_out: Tensor,
    cur_softmax_max: Tensor,
    cur_softmax_sum: Tensor,
    *,
    actual_seq_qlen: Any = None,
    input_layout: str = "SBH",
    input_softmax_layout: str = "",
) -> tuple[Tensor, Tensor, Tensor]:
    assert input_layout == "SBH" and prev_attn_out.dtype == cur_attn_out.dtype
    largest = torch.maximum(prev_softmax_max, cur_softmax_max)
    first = prev_softmax_sum * (prev_softmax_max - largest).exp()
    second = cur_softmax_sum * (cur_softmax_max - largest).exp()
    total = first + second
    heads = largest.shape[1]

    def share(part: Tensor) -> Tensor:
        # [b, n, s, 8] -> [s, b, n, 1]
        return (part / total)[..., 0].permute(2, 0, 1).unsqueeze(-1)

    old, new = (t.float().unflatten(2, (heads, -1)) for t in (prev_attn_out, cur_attn_out))
    merged = (old * share(first) + new * share(second)).flatten(2)
    return merged.to(prev_attn_out.dtype), largest, total


# --- scaled masked softmax: masked scores are -10000 --------------------------------------------------------


@kernel("npu_scaled_masked_softmax")
def scaled_masked_softmax(x: Tensor, mask: Tensor, scale: float = 1, fixed_triu_mask: bool = False) -> Tensor:
    assert x.dim() == 4 and mask.dtype == torch.bool and not fixed_triu_mask
    assert all(side % 32 == 0 and 32 <= side <= 4096 for side in x.shape[-2:])
    scores = torch.where(mask, torch.tensor(-10000.0), x.float() * scale)
    weights = (scores - scores.max(-1, keepdim=True).values).exp()
    return (weights / weights.sum(-1, keepdim=True)).to(x.dtype)


@kernel("npu_scaled_masked_softmax_backward")
def scaled_masked_softmax_backward(
    y_grad: Tensor, y: Tensor, mask: Tensor, scale: float, fixed_triu_mask: bool
) -> Tensor:
    grad, p = y_grad.float(), y.float()
    return (scale * p * (grad - (grad * p).sum(-1, keepdim=True))).to(y.dtype)
