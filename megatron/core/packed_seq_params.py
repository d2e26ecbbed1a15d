"""Description of a batch whose sequences are packed into one row."""

from dataclasses import dataclass

from torch import Tensor


@dataclass
class PackedSeqParams:
    """Where the sequences of a packed batch begin and end.

    Attributes:
        qkv_format: layout word; ``"thd"`` for packed rows, ``"sbhd"`` otherwise.
        cu_seqlens_q: cumulative query lengths, starting with 0.  [sequences + 1]
        cu_seqlens_kv: the same for keys and values.
        cu_seqlens_q_padded: the same, counting padding.
        cu_seqlens_kv_padded: the same, counting padding.
        max_seqlen_q: longest query sequence.
        max_seqlen_kv: longest key sequence.
    """

    qkv_format: str | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_kv: Tensor | None = None
    cu_seqlens_q_padded: Tensor | None = None
    cu_seqlens_kv_padded: Tensor | None = None
    max_seqlen_q: Tensor | None = None
    max_seqlen_kv: Tensor | None = None

    def longest(self) -> int:
        """Positions of the longest sequence, counted where it was not told."""
        queries = _longest(self.max_seqlen_q, self.cu_seqlens_q)
        return max(queries, _longest(self.max_seqlen_kv, self.cu_seqlens_kv))


def _longest(told: Tensor | None, ends: Tensor | None) -> int:
    if told is not None:
        return int(told)
    assert ends is not None, "packed sequences come with their ends"
    return int((ends[1:] - ends[:-1]).max())
