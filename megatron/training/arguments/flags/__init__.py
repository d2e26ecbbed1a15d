"""Every flag, one file per section; ``GROUPS`` has them in the order in which ``--help`` prints them."""

from functools import cache

from megatron.training.arguments.flag import Flag, Group
from megatron.training.arguments.flags import (
    checkpointing,
    data,
    data_parallel,
    distributed,
    kernels,
    logging,
    model,
    moe,
    optimizer,
    other_programs,
    precision,
    training,
)

GROUPS: tuple[Group, ...] = (
    model.NETWORK,
    optimizer.REGULARIZATION,
    training.RUN,
    kernels.RECOMPUTE,
    kernels.KERNELS,
    optimizer.OPTIMIZER,
    logging.DIAGNOSTICS,
    model.INITIALIZATION,
    optimizer.LEARNING_RATE,
    checkpointing.CHECKPOINTING,
    precision.PRECISION,
    precision.FP8,
    distributed.DISTRIBUTED,
    data_parallel.DATA_PARALLEL,
    kernels.OVERLAP,
    training.VALIDATION,
    data.DATA,
    data.TOKENIZER,
    moe.MOE,
    model.LATENT,
    logging.LOGGING,
    logging.SERVICES,
    model.EXPERIMENTAL,
    other_programs.INFERENCE,
    other_programs.RETRIEVAL,
    other_programs.VISION,
    other_programs.HYBRID,
)
ALL_FLAGS: tuple[Flag, ...] = tuple(flag for group in GROUPS for flag in group.flags)
# Arguments of flags that change nothing: they never reach a config.
INERT_DESTS = frozenset(flag.dest for flag in ALL_FLAGS if flag.is_inert)
# Arguments and config fields that are first read when set-up is over, or before reads are recorded. Some wait
# for something that need not happen, such as an evaluation.
READ_LATER = frozenset(flag.read_as or flag.dest for flag in ALL_FLAGS if flag.read)


@cache
def flags_by_name() -> dict[str, Flag]:
    """Every flag by each of its spellings."""
    return {name: flag for flag in ALL_FLAGS for name in flag.names}
