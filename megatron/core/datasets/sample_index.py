"""Where every sample of ``sequence_length`` tokens starts when sequences are laid end to end."""

import numpy as np

_INT32_MAX = 2**31 - 1


def count_samples(
    sequence_length: int,
    total_tokens: int,
    drop_last_partial_sequence: bool,
    add_extra_token_to_sequence: bool,
) -> int:
    """Number of samples in a stream of ``total_tokens`` tokens (all epochs).

    When the last, partial sample is kept the quotient is taken in single precision, which is part of
    the data order other programs rely on.
    """
    usable = max(total_tokens - int(add_extra_token_to_sequence), 0)
    if drop_last_partial_sequence:
        return usable // sequence_length
    return int(np.ceil(np.float32(usable) / np.float32(sequence_length)))


def build_sample_rows(
    sizes: np.ndarray,
    document_indices: np.ndarray,
    sequence_length: int,
    num_epochs: int,
    tokens_per_epoch: int,
    drop_last_partial_sequence: bool,
    add_extra_token_to_sequence: bool,
    dtype: type[np.integer],
) -> np.ndarray:
    """Start of every sample, and of the one that would follow the last.

    With an extra token (samples of L + 1 tokens that overlap by one) row i is where token i * L lies.
    Without it, row i is one past token i * L - 1, so an offset may equal the length of its sequence.
    Both are in "the sequence that holds token i * L + extra - 1"; how many rows each sequence holds follows
    from the running sum of the lengths.

    Args:
        sizes: int32 [sequences], tokens per sequence.
        document_indices: int [positions], sequences in reading order.

    Returns:
        [samples + 1, 2]: (position in ``document_indices``, token offset in that sequence).
    """
    extra = int(add_extra_token_to_sequence)
    samples = count_samples(
        sequence_length,
        num_epochs * tokens_per_epoch,
        drop_last_partial_sequence,
        add_extra_token_to_sequence,
    )
    rows = np.zeros((samples + 1, 2), dtype=dtype)
    if samples == 0:
        return rows
    lengths = sizes[document_indices]
    ends = np.cumsum(lengths, dtype=np.int64)
    # Rows 1 ... i lie in the first d sequences exactly when i * L + extra <= ends[d - 1].
    rows_up_to = np.clip((ends - extra) // sequence_length, 0, samples)
    position = np.repeat(np.arange(len(ends)), np.diff(rows_up_to, prepend=0))
    whole = len(position)  # less than ``samples`` only when the last, partial one is kept
    rows[1 : whole + 1, 0] = position
    ends -= lengths  # now where each sequence begins
    rows[1 : whole + 1, 1] = np.arange(1, whole + 1) * sequence_length - ends[position]
    rows[whole + 1 :] = len(ends) - 1, int(lengths[-1]) - extra
    return rows


def build_sample_idx_int32(
    sizes: np.ndarray,
    document_idx: np.ndarray,
    seq_length: int,
    num_epochs: int,
    tokens_per_epoch: int,
    drop_last_partial_sequence: bool = True,
    add_extra_token_to_sequence: bool = True,
) -> np.ndarray:
    """:func:`build_sample_rows` as int32."""
    return build_sample_rows(
        sizes,
        document_idx,
        seq_length,
        num_epochs,
        tokens_per_epoch,
        drop_last_partial_sequence,
        add_extra_token_to_sequence,
        np.int32,
    )


def build_sample_idx_int64(
    sizes: np.ndarray,
    document_idx: np.ndarray,
    seq_length: int,
    num_epochs: int,
    tokens_per_epoch: int,
    drop_last_partial_sequence: bool = True,
    add_extra_token_to_sequence: bool = True,
) -> np.ndarray:
    """:func:`build_sample_rows` as int64."""
    return build_sample_rows(
        sizes,
        document_idx,
        seq_length,
        num_epochs,
        tokens_per_epoch,
        drop_last_partial_sequence,
        add_extra_token_to_sequence,
        np.int64,
    )


def build_sample_idx(
    sizes: np.ndarray,
    document_indices: np.ndarray,
    sequence_length: int,
    num_epochs: int,
    tokens_per_epoch: int,
    drop_last_partial_sequence: bool = True,
    add_extra_token_to_sequence: bool = True,
) -> np.ndarray:
    """:func:`build_sample_rows`, int32 unless a position or an offset does not fit."""
    largest = max(len(document_indices), int(sizes.max()) if len(sizes) else 0)
    return build_sample_rows(
        sizes,
        document_indices,
        sequence_length,
        num_epochs,
        tokens_per_epoch,
        drop_last_partial_sequence,
        add_extra_token_to_sequence,
        np.int32 if largest <= _INT32_MAX else np.int64,
    )
