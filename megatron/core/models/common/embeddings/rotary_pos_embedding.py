"""Tables of rotary angles (Su et al., 2021), with linear interpolation and Llama 3's frequency scaling."""

import functools
import math
from typing import Any

import torch
from torch import Tensor, nn

from megatron import unbuilt
from megatron.core import accelerator
from megatron.core.context_parallel.zigzag import own_place, take_chunks
from megatron.core.errors import UsageError
from megatron.core.models.common.embeddings.rope_utils import (  # noqa: F401  (importable from here)
    _apply_rotary_pos_emb_bshd,
    _apply_rotary_pos_emb_thd,
    _rotate_half,
    angles_of_channels,
    apply_rotary_pos_emb,
    get_pos_emb_on_this_cp_rank,
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.utils import deprecate_inference_params

__getattr__ = unbuilt.names_of(__name__)

# Llama 3 scaling: wavelengths are compared with this context length over these factors.
_ORIGINAL_CONTEXT = 8192
_LOW_FREQUENCY_FACTOR = 1.0
_HIGH_FREQUENCY_FACTOR = 4.0


class RotaryEmbedding(nn.Module):
    """Angles of every position and channel.

    Channel pair k of d_rot turns by ``base^(-2k / d_rot)`` per position. Nothing is stored in checkpoints; an
    ``inv_freq`` found in one is dropped.

    Args:
        kv_channels: width of a head.
        rotary_percent: share of it that is rotated.
        rotary_interleaved: pairs are neighbouring channels.
        seq_len_interpolation_factor: positions are divided by this.
        rotary_base: base of the frequencies.
        rope_scaling: apply Llama 3's scaling of low frequencies.
        rope_scaling_factor: by how much the lowest ones shrink.
        use_cpu_initialization: build the frequencies on the CPU.
    """

    def __init__(
        self,
        kv_channels: int,
        rotary_percent: float,
        rotary_interleaved: bool = False,
        seq_len_interpolation_factor: float | None = None,
        rotary_base: float = 10000,
        rope_scaling: bool = False,
        rope_scaling_factor: float = 8.0,
        use_cpu_initialization: bool = False,
    ):
        super().__init__()
        width = kv_channels if rotary_percent >= 1.0 else int(kv_channels * rotary_percent)
        self.rotary_interleaved = rotary_interleaved
        self.seq_len_interpolation_factor = seq_len_interpolation_factor
        device = torch.device(accelerator.CPU) if use_cpu_initialization else accelerator.current_device()
        exponents = torch.arange(0, width, 2, dtype=torch.float32, device=device) / width
        self.inv_freq = 1.0 / (rotary_base**exponents)
        if rope_scaling:
            self.inv_freq = _scale_low_frequencies(self.inv_freq, rope_scaling_factor)
        # One table per length and offset, shared by all layers and micro-batches.
        self._table = functools.lru_cache(maxsize=32)(self._make_table)

    def get_freqs_non_repeated(self, max_seq_len: int, offset: int = 0) -> Tensor:
        """Position times frequency.  [s, d_rot / 2], fp32"""
        device = accelerator.current_device()
        positions = torch.arange(max_seq_len, dtype=torch.float32, device=device) + offset
        if self.seq_len_interpolation_factor is not None:
            positions = positions / self.seq_len_interpolation_factor
        return torch.outer(positions, self.inv_freq.to(device))

    def get_cos_sin(self, max_seq_len: int, offset: int = 0) -> tuple[Tensor, Tensor]:
        """Cosine and sine of the angles.  2 x [s, d_rot / 2]"""
        freqs = self.get_freqs_non_repeated(max_seq_len, offset)
        return freqs.cos(), freqs.sin()

    def forward(self, max_seq_len: int, offset: int = 0, packed_seq: bool = False) -> Tensor:
        """Angles with one entry per channel, of this context-parallel rank's positions.

        Args:
            max_seq_len: positions of the whole sequence.
            offset: first position.
            packed_seq: give all positions: those of a packed sequence are chosen where they are used.

        Returns:
            [s/CP, 1, 1, d_rot] ([s, ..] if packed); cached: do not write to it.
        """
        # Part of the key: a table outlives the process groups.
        rank, size = (0, 1) if packed_seq else own_place()
        return self._table(max_seq_len, offset, rank, size)

    def _make_table(self, max_seq_len: int, offset: int, rank: int, size: int) -> Tensor:
        freqs = self.get_freqs_non_repeated(max_seq_len, offset)
        both = angles_of_channels(freqs, self.rotary_interleaved)
        # [s, d_rot] -> [s, 1, 1, d_rot]
        return take_chunks(both[:, None, None, :], 0, rank, size)

    def get_rotary_seq_len(
        self,
        inference_context: Any,
        transformer: Any,
        transformer_input: Tensor | None,
        transformer_config: Any,
        packed_seq_params: PackedSeqParams | None,
        *,
        inference_params: Any = None,
    ) -> int:
        """How many positions a table needs.

        Of packed sequences the longest; of a static inference batch as many as it may get; otherwise those of
        the stack's input over all ranks that share a sequence.
        """
        if packed_seq_params is not None:
            return packed_seq_params.longest()
        inference_context = deprecate_inference_params(inference_context, inference_params)
        if inference_context is not None:
            return inference_context.max_sequence_length * transformer_config.context_parallel_size
        received = getattr(transformer, "input_tensor", None)
        stack_input = received if received is not None else transformer_input
        if stack_input is None:
            raise UsageError("a table is as long as the stack's input: pass transformer_input")
        length = stack_input.shape[0]
        if transformer_config.sequence_parallel:
            length *= transformer_config.tensor_model_parallel_size
        return length * transformer_config.context_parallel_size

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        state_dict.pop(f"{prefix}inv_freq", None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _scale_low_frequencies(inv_freq: Tensor, factor: float) -> Tensor:
    """Divides frequencies by ``factor`` where their wavelength exceeds the original context L.

    Unchanged below L/4, a linear mix in (L / wavelength) between (Llama 3.1 model card).
    """
    wavelength = 2.0 * math.pi / inv_freq
    mix = (_ORIGINAL_CONTEXT / wavelength - _LOW_FREQUENCY_FACTOR) / (
        _HIGH_FREQUENCY_FACTOR - _LOW_FREQUENCY_FACTOR
    )
    mix = mix.clamp(0.0, 1.0)
    return (1.0 - mix) * inv_freq / factor + mix * inv_freq
