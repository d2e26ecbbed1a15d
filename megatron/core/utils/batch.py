"""Which part of a batch this rank works on."""

from typing import Any


def get_batch_on_this_cp_rank(batch: dict[str, Any]) -> dict[str, Any]:
    """This context-parallel rank's part of a batch: chunks r and 2*CP-1-r of 2*CP chunks of the sequence.

    Args:
        batch: tensors [b, s, ...], split along s; ``attention_mask`` [b, 1, s, s] is split along its queries
            (dimension 2) and keeps all keys; None stays None.

    Returns:
        A new dict; the same one at size 1.

    Raises:
        ConfigError: a sequence does not divide into 2*CP chunks.
    """
    from megatron.core.context_parallel.zigzag import own_place, take_chunks

    rank, size = own_place()
    if size == 1:
        return batch
    return {
        name: None if t is None else take_chunks(t, 2 if name == "attention_mask" else 1, rank, size)
        for name, t in batch.items()
    }
