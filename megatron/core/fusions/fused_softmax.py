"""Softmax of attention scores: scale, mask, normalise; a function and the modules that user code knows."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from megatron.core.errors import ConfigError
from megatron.core.fusions.attention_masks import get_default_causal_mask
from megatron.core.overrides import overridable
from megatron.core.transformer.enums import AttnMaskType

# What masked scores are set to before the softmax. Finite, so that a row in which everything is masked stays
# a number.
MASKED_SCORE = -10000.0


def soft_cap(x: Tensor, cap: float) -> Tensor:
    """``cap * tanh(x / cap)``: about x for small numbers, and never beyond the cap."""
    return torch.tanh(x / cap) * cap


@overridable
def scaled_masked_softmax(scores: Tensor, mask: Tensor | None, scale: float, in_fp32: bool) -> Tensor:
    """``softmax(masked(scale * scores, mask))`` over the last dimension.

    Args:
        scores: [b, n, sq, sk].
        mask: bool, broadcastable to the scores, True where a key is masked; None masks nothing.
        scale: factor in front of the scores.
        in_fp32: widen half-precision scores first.

    Returns:
        Probabilities in the dtype of ``scores``.
    """
    wide = scores.float() if in_fp32 else scores
    if scale != 1.0:
        wide = wide * scale
    if mask is not None:
        wide = wide.masked_fill(mask, MASKED_SCORE)
    return torch.softmax(wide, dim=-1).to(scores.dtype)


class FusedScaleMaskSoftmax(nn.Module):
    """``softmax(mask(scale * x))``, by the replaceable kernel or by plain operations.

    Args:
        input_in_fp16, input_in_bf16: precision of the scores; not both.
        attn_mask_type: a causal type builds the triangular mask when no mask is given.
        scaled_masked_softmax_fusion: use the replaceable kernel.
        mask_func: ``(scores, mask) -> scores`` of the plain path.
        softmax_in_fp32: widen scores before the softmax.
        scale: factor in front of the scores, or None for 1; needs ``softmax_in_fp32``.
    """

    def __init__(
        self,
        input_in_fp16: bool,
        input_in_bf16: bool,
        attn_mask_type: AttnMaskType,
        scaled_masked_softmax_fusion: bool,
        mask_func: Callable[[Tensor, Tensor], Tensor],
        softmax_in_fp32: bool,
        scale: float | None,
    ):
        super().__init__()
        if input_in_fp16 and input_in_bf16:
            raise ConfigError(
                "scores cannot be fp16 and bf16 at once: set one of input_in_fp16, input_in_bf16"
            )
        if scale is not None and not softmax_in_fp32:
            raise ConfigError(f"scale {scale} needs softmax_in_fp32=True")
        self.input_in_float16 = input_in_fp16 or input_in_bf16
        self.attn_mask_type = attn_mask_type
        self.scaled_masked_softmax_fusion = scaled_masked_softmax_fusion
        self.mask_func = mask_func
        self.softmax_in_fp32 = softmax_in_fp32
        self.scale = scale

    def forward(self, input: Tensor, mask: Tensor | None) -> Tensor:
        """Probabilities of scores [b, n, sq, sk]; mask: bool, True masks, [b or 1, 1, sq, sk] or None."""
        if mask is None and self.attn_mask_type == AttnMaskType.causal:
            sq, sk = input.shape[-2:]
            if sq == sk:
                mask = get_default_causal_mask(sq)
            else:
                # Queries are the last sq positions of the keys.
                mask = torch.ones(sq, sk, dtype=torch.bool, device=input.device).triu_(1 + sk - sq)
        if self.is_kernel_available(mask, *input.shape):
            return self.forward_fused_softmax(input, mask)
        return self.forward_torch_softmax(input, mask)

    def is_kernel_available(self, mask: Tensor | None, b: int, np: int, sq: int, sk: int) -> bool:
        """Whether the kernel is asked for and takes these scores (half precision, sizes)."""
        return (
            self.scaled_masked_softmax_fusion
            and self.input_in_float16
            and 16 < sk <= 4096
            and sq % 4 == 0
            and sk % 4 == 0
            and (b * np) % 4 == 0
        )

    def forward_fused_softmax(self, input: Tensor, mask: Tensor | None) -> Tensor:
        """The replaceable kernel."""
        return scaled_masked_softmax(
            input, mask, 1.0 if self.scale is None else self.scale, self.softmax_in_fp32
        )

    def forward_torch_softmax(self, input: Tensor, mask: Tensor | None) -> Tensor:
        """Plain operations, with this module's own ``mask_func``."""
        scores = input.float() if self.input_in_float16 and self.softmax_in_fp32 else input
        if self.scale is not None:
            scores = scores * self.scale
        if mask is not None:
            scores = self.mask_func(scores, mask)
        return torch.softmax(scores, dim=-1).to(input.dtype)

    @staticmethod
    def get_batch_per_block(sq: int, sk: int, b: int, np: int) -> int:
        """Rows of scores that one block of threads of the original's kernel works on.

        A warp of up to 32 threads takes 2 rows of up to 128 scores, 1 row of more; a block has 128 threads.
        """
        width = 1 << max(sk - 1, 0).bit_length()
        return 128 // min(width, 32) * (2 if width <= 128 else 1)


# ---- For scripts written for Megatron-LM: nothing in this project calls what follows ----


class ScaledUpperTriangMaskedSoftmax:
    """Causal softmax of 3-D scores [b*n, s, s]."""

    @staticmethod
    def apply(inputs: Tensor, scale: float) -> Tensor:
        mask = get_default_causal_mask(inputs.shape[-2])
        return scaled_masked_softmax(inputs.unsqueeze(0), mask, scale, True).squeeze(0)


class ScaledMaskedSoftmax:
    """Softmax of 4-D scores [b, n, sq, sk] under a mask."""

    @staticmethod
    def apply(inputs: Tensor, mask: Tensor, scale: float) -> Tensor:
        return scaled_masked_softmax(inputs, mask, scale, True)


class ScaledSoftmax:
    """Softmax of 4-D scores with nothing masked."""

    @staticmethod
    def apply(inputs: Tensor, scale: float) -> Tensor:
        return scaled_masked_softmax(inputs, None, scale, True)
