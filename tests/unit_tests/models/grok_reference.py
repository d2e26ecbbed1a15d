"""Grok-1 in float64, from the published description of its layers, on a model's own weights.

x <- x + post_attn_norm(attention(input_norm(x))); x <- x + post_mlp_norm(mixture(pre_mlp_norm(x))); the
embedding and the logits have a factor each, attention scores a soft cap in front of the mask.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-5
GATES = {
    "silu": lambda x: x * torch.sigmoid(x),
    "gelu": F.gelu,
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
}


@dataclass(frozen=True)
class Shape:
    """What the weights alone do not say. ``top_k`` 0: an MLP in place of the experts."""

    layers: int
    heads: int
    groups: int
    gate: str = "silu"
    post_norm: bool = False
    embedding_factor: float = 1.0
    logit_factor: float = 1.0
    attention_cap: float | None = None
    logit_cap: float | None = None
    top_k: int = 0
    softmax_first: bool = False


def logits(weights: Mapping[str, Tensor], tokens: Tensor, shape: Shape) -> Tensor:
    """[b, s] -> [b, s, v]; ``weights`` by their names in a checkpoint of the local layer spec."""
    x = weights["embedding.word_embeddings.weight"][tokens] * shape.embedding_factor
    for number in range(shape.layers):
        prefix = f"decoder.layers.{number}."
        layer = {name[len(prefix) :]: w for name, w in weights.items() if name.startswith(prefix)}
        x = x + _branch(layer, "input_layernorm", "post_attn_norm", _attention, x, shape)
        mix = _experts if shape.top_k else _mlp
        x = x + _branch(layer, "pre_mlp_layernorm", "post_mlp_layernorm", mix, x, shape)
    x = _norm(x, weights["decoder.final_layernorm.weight"])
    tied = weights["embedding.word_embeddings.weight"]
    out = x @ weights.get("output_layer.weight", tied).T * shape.logit_factor
    return _cap(out, shape.logit_cap)


def _branch(layer, norm, post_norm, function, x, shape):
    out = function(layer, _norm(x, layer[norm + ".weight"]), shape)
    return _norm(out, layer[post_norm + ".weight"]) if shape.post_norm else out


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + EPSILON) * weight


def _cap(x: Tensor, cap: float | None) -> Tensor:
    return x if cap is None else cap * torch.tanh(x / cap)


def _attention(layer, x: Tensor, shape: Shape) -> Tensor:
    b, s, _ = x.shape
    per_group = shape.heads // shape.groups
    # Rows of a group: its query heads, then its key, then its value.
    mixed = (x @ layer["self_attention.linear_qkv.weight"].T).view(b, s, shape.groups, per_group + 2, -1)
    q, k, v = mixed.split([per_group, 1, 1], dim=3)
    q, k = _rotated(q), _rotated(k)
    scores = torch.einsum("bqgrd,bkgod->bgrqk", q, k) * q.shape[-1] ** -0.5
    later = torch.arange(s)[None, :] > torch.arange(s)[:, None]
    weights = torch.softmax(_cap(scores, shape.attention_cap).masked_fill(later, -torch.inf), -1)
    out = torch.einsum("bgrqk,bkgod->bqgrd", weights, v).flatten(2)
    return out @ layer["self_attention.linear_proj.weight"].T


def _rotated(x: Tensor) -> Tensor:
    """[b, s, g, r, d]: channel i turns with channel i + d/2, by position / 10000^(2i/d)."""
    half = x.shape[-1] // 2
    speeds = 10000.0 ** (-torch.arange(half, dtype=x.dtype) / half)
    angles = (torch.arange(x.shape[1], dtype=x.dtype)[:, None] * speeds)[None, :, None, None]
    first, second = x[..., :half], x[..., half:]
    turned = (first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin())
    return torch.cat(turned, -1)


def _mlp(layer, x: Tensor, shape: Shape, prefix: str = "mlp.") -> Tensor:
    gate, up = (x @ layer[prefix + "linear_fc1.weight"].T).chunk(2, -1)
    return (GATES[shape.gate](gate) * up) @ layer[prefix + "linear_fc2.weight"].T


def _experts(layer, x: Tensor, shape: Shape) -> Tensor:
    scores = x @ layer["mlp.router.weight"].T
    if shape.softmax_first:
        chosen, experts = torch.softmax(scores, -1).topk(shape.top_k, -1)
    else:
        chosen, experts = scores.topk(shape.top_k, -1)
        chosen = torch.softmax(chosen, -1)
    weights = torch.zeros_like(scores).scatter(-1, experts, chosen)
    every = [
        _mlp(layer, x, shape, f"mlp.experts.local_experts.{number}.") for number in range(scores.shape[-1])
    ]
    return torch.einsum("bse,ebsh->bsh", weights, torch.stack(every))
