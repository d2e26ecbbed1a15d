"""Rotary angles for contexts longer than the trained one: YaRN (Peng et al., 2023)."""

import math

import torch
from torch import Tensor

from megatron.core.context_parallel.zigzag import own_place
from megatron.core.errors import ConfigError
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding


def yarn_mscale(scale: float, mscale: float) -> float:
    """Magnitude by which attention grows with the context: ``0.1 * mscale * ln(scale) + 1``, at least 1.

    Args:
        scale: new context length over the original one.
        mscale: strength.
    """
    return 1.0 if scale <= 1.0 else 0.1 * mscale * math.log(scale) + 1.0


class YarnRotaryEmbedding(RotaryEmbedding):
    """Angles of which low frequencies are interpolated, high ones kept, and those between mixed.

    Channel pair k turns by ``base^(-2k/d) * (1 - m_k) / scaling_factor + base^(-2k/d) * m_k`` per position,
    where m falls from 1 to 0 between the pair that turns ``beta_fast`` times within the original context and
    the one that turns ``beta_slow`` times.

    Args:
        kv_channels, rotary_percent, rotary_interleaved: as of :class:`RotaryEmbedding`.
        seq_len_interpolation_factor, rotary_base, use_cpu_initialization: likewise.
        scaling_factor: new context length over the original one.
        original_max_position_embeddings: length of the original context.
        beta_fast, beta_slow: turns within it.
        mscale, mscale_all_dim: strengths of the magnitudes whose quotient multiplies cosine and sine.
    """

    def __init__(
        self,
        kv_channels: int,
        rotary_percent: float = 1.0,
        rotary_interleaved: bool = False,
        seq_len_interpolation_factor: float | None = None,
        rotary_base: float = 10000.0,
        use_cpu_initialization: bool = False,
        scaling_factor: float = 1.0,
        original_max_position_embeddings: int = 4096,
        beta_fast: float = 32.0,
        beta_slow: float = 1.0,
        mscale: float = 1.0,
        mscale_all_dim: float = 0.0,
    ):
        super().__init__(
            kv_channels,
            rotary_percent,
            rotary_interleaved,
            seq_len_interpolation_factor,
            rotary_base,
            use_cpu_initialization=use_cpu_initialization,
        )
        if scaling_factor <= 0 or original_max_position_embeddings < 1:
            raise ConfigError(
                f"YaRN with scaling factor {scaling_factor} over an original context of "
                f"{original_max_position_embeddings}: both must be positive"
            )
        self.rotary_base = rotary_base
        self.scaling_factor = scaling_factor
        width = 2 * len(self.inv_freq)
        first, last = (
            _pair_of_turns(turns, width, rotary_base, original_max_position_embeddings)
            for turns in (beta_fast, beta_slow)
        )
        pairs = torch.arange(len(self.inv_freq), dtype=torch.float32, device=self.inv_freq.device)
        interpolated = _ramp(pairs, max(math.floor(first), 0), min(math.ceil(last), width - 1))
        self.inv_freq = self.inv_freq * (1.0 - interpolated) + self.inv_freq / scaling_factor * interpolated
        self.magnitude = yarn_mscale(scaling_factor, mscale) / yarn_mscale(scaling_factor, mscale_all_dim)

    def forward(  # type: ignore[override]  # the original returns a pair here as well
        self, max_seq_len: int, offset: int = 0, packed_seq: bool = False
    ) -> tuple[Tensor, float]:
        """The table of :class:`RotaryEmbedding`, and the factor of cosine and sine."""
        rank, size = (0, 1) if packed_seq else own_place()
        return self._table(max_seq_len, offset, rank, size), self.magnitude


def _pair_of_turns(turns: float, width: int, base: float, context: int) -> float:
    """The channel pair, counted with fractions, that turns ``turns`` times within ``context`` positions."""
    return width * math.log(context / (2 * math.pi * turns)) / (2 * math.log(base))


def _ramp(pairs: Tensor, low: float, high: float) -> Tensor:
    """0 up to ``low``, 1 from ``high``, a line between; a step where they meet."""
    return ((pairs - low) / max(high - low, 1e-3)).clamp(0.0, 1.0)


# ---- For scripts written for Megatron-LM: nothing in this project calls what follows ----


def _yarn_get_mscale(scale: float = 1, mscale: float = 1) -> float:
    """Other name of :func:`yarn_mscale`."""
    return yarn_mscale(scale, mscale)
