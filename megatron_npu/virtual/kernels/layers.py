"""Parts of a layer that treat each token alone: activations, RMSNorm and rotary positions."""

import math

import torch
from torch import Tensor

from megatron_npu.virtual.kernels import kernel

_HALF = (torch.float16, torch.bfloat16)


# --- activations, gated and not; each is differentiated by hand, by its own backward operator ------------


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


def gelu_and_slope(x: Tensor, tanh: bool) -> tuple[Tensor, Tensor]:
    """Value and derivative, from the definitions."""
    if not tanh:
        normal = 0.5 * (1 + torch.special.erf(x / math.sqrt(2)))
        return x * normal, normal + x * torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    root = math.sqrt(2 / math.pi)
    wave = torch.tanh(root * (x + 0.044715 * x**3))
    slope = 0.5 * (1 + wave) + 0.5 * x * (1 - wave**2) * root * (1 + 3 * 0.044715 * x**2)
    return 0.5 * x * (1 + wave), slope


@kernel("npu_gelu")
def gelu(input: Tensor, *, approximate: str = "none") -> Tensor:
    assert approximate in ("none", "tanh")
    return gelu_and_slope(_wide(input), approximate == "tanh")[0].to(input.dtype)


@kernel("npu_gelu_backward")
def gelu_backward(grad_output: Tensor, input: Tensor, *, approximate: str = "none") -> Tensor:
    slope = gelu_and_slope(_wide(input), approximate == "tanh")[1]
    return (_wide(grad_output) * slope).to(input.dtype)


@kernel("npu_swiglu")
def swiglu(input: Tensor, dim: int = -1) -> Tensor:
    assert input.is_contiguous() and input.shape[dim] % 2 == 0
    gate, up = _wide(input).chunk(2, dim)
    return (gate / (1 + torch.exp(-gate)) * up).to(input.dtype)


@kernel("npu_swiglu_backward")
def swiglu_backward(grad_output: Tensor, input: Tensor, dim: int = -1) -> Tensor:
    gate, up = _wide(input).chunk(2, dim)
    grad, share = _wide(grad_output), 1 / (1 + torch.exp(-gate))
    parts = (grad * up * share * (1 + gate * (1 - share)), grad * gate * share)
    return torch.cat(parts, dim).to(input.dtype)


def _halves(t: Tensor, dim: int, activate_left: bool) -> tuple[Tensor, Tensor]:
    """(plain, activated)"""
    left, right = _wide(t).chunk(2, dim)
    return (right, left) if activate_left else (left, right)


@kernel("npu_geglu")
def geglu(
    input: Tensor, dim: int = -1, approximate: int = 1, activate_left: bool = False
) -> tuple[Tensor, Tensor]:
    assert input.is_contiguous() and approximate in (0, 1)
    plain, activated = _halves(input, dim, activate_left)
    value = gelu_and_slope(activated, approximate == 1)[0]
    return (plain * value).to(input.dtype), value.to(input.dtype)


@kernel("npu_geglu_grad")
def geglu_backward(
    grad_output: Tensor,
    input: Tensor,
    gelu: Tensor,
    dim: int = -1,
    approximate: int = 1,
    activate_left: bool = False,
) -> Tensor:
    plain, activated = _halves(input, dim, activate_left)
    slope = gelu_and_slope(activated, approximate == 1)[1]
    grad = _wide(grad_output)
    to_plain, to_activated = grad * _wide(gelu), grad * plain * slope
    order = (to_activated, to_plain) if activate_left else (to_plain, to_activated)
    return torch.cat(order, dim).to(input.dtype)


# --- RMSNorm: fp32 inside, one rounding after the product with gamma -------------------------------------


@kernel("npu_rms_norm")
def rms_norm(input: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    assert input.dtype == gamma.dtype or (input.dtype in _HALF and gamma.dtype == torch.float32)
    assert 2 <= input.dim() <= 8
    x = input.float()
    rstd = 1 / ((x * x).mean(-1, keepdim=True) + epsilon).sqrt()
    return (x * rstd * gamma.float()).to(input.dtype), rstd


@kernel("npu_rms_norm_backward")
def rms_norm_backward(dy: Tensor, input: Tensor, gamma: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    x, grad, width = input.float(), dy.float(), gamma.numel()
    unit = x * rstd
    inner = grad * gamma.float()
    dx = rstd * (inner - unit * (inner * unit).sum(-1, keepdim=True) / width)
    dgamma = (grad * unit).reshape(-1, width).sum(0)
    return dx.to(input.dtype), dgamma.to(gamma.dtype)


# --- rotation of channel pairs ---------------------------------------------------------------------------


def rotated(x: Tensor, mode: str) -> Tensor:
    """Halves [a | b] -> [-b | a]; interleaved pairs (x0, x1) -> (-x1, x0)."""
    if mode == "half":
        middle = x.shape[-1] // 2
        return torch.cat((-x[..., middle:], x[..., :middle]), -1)
    assert mode == "interleave"
    out = torch.empty_like(x)
    out[..., 0::2], out[..., 1::2] = -x[..., 1::2], x[..., 0::2]
    return out


@kernel("npu_rotary_mul")
def rotary_mul(
    input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half", rotate: Tensor | None = None
) -> Tensor:
    assert rotate is None and input.dim() == 4 and input.shape[-1] % 2 == 0 and input.shape[-1] < 896
    assert r1.shape == r2.shape and r1.shape[-1] == input.shape[-1]
    # Tables of another type are rounded to that of the input first.
    x, cos, sin = input.float(), r1.to(input.dtype).float(), r2.to(input.dtype).float()
    return (x * cos + rotated(x, rotary_mode) * sin).to(input.dtype)
