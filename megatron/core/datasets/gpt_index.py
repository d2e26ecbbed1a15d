"""The three arrays that say which tokens a GPT sample is made of.

* document index: the sequences of all epochs in reading order, shuffled;
* sample index: where each run of ``sequence_length`` tokens starts in that order;
* shuffle index: the order in which those runs are used.

Here "document" is one stored sequence. All randomness comes from one legacy ``RandomState``, used for
the document index first and the shuffle index second.
"""

from dataclasses import dataclass

import numpy as np

from megatron.core.datasets.sample_index import build_sample_idx, count_samples

# The last epoch is shuffled apart when less than this share of its samples is wanted.
_SEPARATE_LAST_EPOCH_BELOW = 0.80
_UINT32_SAMPLES = 2**32 - 2


@dataclass(frozen=True)
class EpochPlan:
    """How often the data is passed over.

    Attributes:
        tokens_per_epoch: tokens of the split.
        epochs: passes.
        samples_before_last: samples of all passes but the last when that one is shuffled apart, else None.
        samples: in all passes.
    """

    tokens_per_epoch: int
    epochs: int
    samples_before_last: int | None
    samples: int


def plan_epochs(
    tokens_per_epoch: int, num_samples: int | None, sequence_length: int, extra: int, drop_last_partial: bool
) -> EpochPlan:
    """Passes needed for ``num_samples`` samples; one when None.

    Args:
        tokens_per_epoch: at least 1 when ``num_samples`` is.
        extra: 1 when samples hold one token more than ``sequence_length``, else 0.
    """
    epochs = 1
    separate = None
    if num_samples:
        epochs = max(1, -(-(num_samples * sequence_length + extra) // tokens_per_epoch))
    if num_samples and epochs > 1:
        before_last = ((epochs - 1) * tokens_per_epoch - extra) // sequence_length
        per_epoch = (tokens_per_epoch - extra) // sequence_length
        if num_samples - before_last < int(_SEPARATE_LAST_EPOCH_BELOW * per_epoch):
            separate = before_last
    samples = count_samples(sequence_length, epochs * tokens_per_epoch, drop_last_partial, bool(extra))
    return EpochPlan(tokens_per_epoch, epochs, separate, samples)


def build_document_index(indices: np.ndarray, plan: EpochPlan, random: np.random.RandomState) -> np.ndarray:
    """int32 [epochs * sequences]."""
    separate = plan.samples_before_last is not None
    blocks = (plan.epochs - 1, 1) if separate else (plan.epochs,)
    shuffled = []
    for epochs in blocks:
        block = np.tile(indices.astype(np.int32), epochs)
        random.shuffle(block)
        shuffled.append(block)
    return np.concatenate(shuffled)


def build_shuffle_index(plan: EpochPlan, random: np.random.RandomState) -> np.ndarray:
    """uint32 [samples] (int64 for very many)."""
    order = np.arange(plan.samples, dtype=np.uint32 if plan.samples < _UINT32_SAMPLES else np.int64)
    if plan.samples_before_last is None:
        random.shuffle(order)
    else:
        random.shuffle(order[: plan.samples_before_last])
        random.shuffle(order[plan.samples_before_last :])
    return order


def build_gpt_index(
    sizes: np.ndarray,
    indices: np.ndarray,
    plan: EpochPlan,
    seed: int,
    sequence_length: int,
    extra: int,
    drop_last_partial: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Document, sample and shuffle index.

    Args:
        sizes: int32, tokens of every stored sequence.
        indices: the sequences of this split.
    """
    random = np.random.RandomState(seed)
    document_index = build_document_index(indices, plan, random)
    sample_index = build_sample_idx(
        sizes,
        document_index,
        sequence_length,
        plan.epochs,
        plan.tokens_per_epoch,
        drop_last_partial,
        bool(extra),
    )
    return document_index, sample_index, build_shuffle_index(plan, random)


_PROBED_ROWS = 1 << 16


def find_index_fault(
    sizes: np.ndarray,
    indices: np.ndarray,
    plan: EpochPlan,
    extra: int,
    document_index: np.ndarray,
    sample_index: np.ndarray,
    shuffle_index: np.ndarray,
) -> str | None:
    """What shows that cached arrays do not belong to this data set, or None.

    The cache key leaves out whether samples hold an extra token. With one, no sample starts past the
    last token of its sequence; without, none but the first starts at token 0: that tells them apart.
    """
    found = document_index.shape, sample_index.shape, shuffle_index.shape
    expected = (plan.epochs * len(indices),), (plan.samples + 1, 2), (plan.samples,)
    if found != expected:
        return f"array shapes {found}, expected {expected}"
    kinds = {array.dtype.kind for array in (document_index, sample_index, shuffle_index)}
    if not kinds <= {"i", "u"}:
        return "arrays are not integers"
    position, offset = np.asarray(sample_index[1:_PROBED_ROWS]).T
    if len(position) and (position.max() >= len(document_index) or position.min() < 0):
        return "a sample starts beyond the data"
    lengths = sizes[document_index[position]]
    if ((offset >= lengths) if extra else (offset == 0) & (lengths > 0)).any():
        return "it was built with the other setting of add_extra_token_to_sequence"
    return None


# ---- For scripts written for Megatron-LM: nothing in this project calls what follows ----


def _build_document_index(
    documents: np.ndarray,
    num_epochs: int,
    numpy_random_state: np.random.RandomState,
    separate_final_epoch: bool,
) -> np.ndarray:
    """:func:`build_document_index` of a number of passes; the last is shuffled apart if so wished."""
    separate = 0 if separate_final_epoch and num_epochs > 1 else None
    return build_document_index(documents, EpochPlan(0, num_epochs, separate, 0), numpy_random_state)


def _build_shuffle_index(
    num_samples: int, total_size: int, numpy_random_state: np.random.RandomState
) -> np.ndarray:
    """:func:`build_shuffle_index` of ``total_size`` samples; those from ``num_samples`` on come last."""
    separate = num_samples if num_samples != total_size else None
    return build_shuffle_index(EpochPlan(0, 0, separate, total_size), numpy_random_state)
