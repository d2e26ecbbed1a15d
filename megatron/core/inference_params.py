"""Type of the inference state that forward signatures mention."""

from dataclasses import dataclass


@dataclass
class InferenceParams:
    """Sizes of a static inference batch: how many sequences, and how long they may become.

    The models here recompute the whole prefix for every new token; they keep no key/value cache, so they
    refuse an inference state rather than ignore it.
    """

    max_batch_size: int
    max_sequence_length: int
