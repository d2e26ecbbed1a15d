"""Which part of a batch this rank works on."""

from typing import Any

from megatron.core.errors import NotBuiltYetError


def get_batch_on_this_cp_rank(batch: dict[str, Any]) -> dict[str, Any]:
    """This context-parallel rank's part of a batch (tensors [b, s, ...]): all of it at size 1."""
    from megatron.core import parallel_state

    size = parallel_state.get_context_parallel_world_size()
    if size > 1:
        raise NotBuiltYetError(
            "splitting a batch over context-parallel ranks", f"--context-parallel-size {size}", "Use 1."
        )
    return batch
