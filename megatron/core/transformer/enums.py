"""Enumerations of attention. Their numbers are part of the interface."""

import enum

from megatron.core.enums import ModelType  # noqa: F401  (also importable from here)


class AttnType(enum.Enum):
    """Whether keys and values come from the same sequence as the queries."""

    self_attn = 1
    cross_attn = 2


class AttnMaskType(enum.Enum):
    """Which keys a query may see."""

    padding = 1
    causal = 2
    no_mask = 3
    padding_causal = 4
    arbitrary = 5


class AttnBackend(enum.Enum):
    """Implementation of attention; the names are what a user types."""

    flash = 1
    fused = 2
    unfused = 3
    local = 4
    auto = 5
