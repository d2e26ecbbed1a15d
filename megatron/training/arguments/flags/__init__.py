"""The flags, one file per group, in the order in which ``--help`` prints them."""

from megatron.training.arguments.flag import Group
from megatron.training.arguments.flags import (
    checkpointing,
    data,
    diagnostics,
    distributed,
    experimental,
    initialization,
    kernels,
    learning_rate,
    logging,
    mixed_precision,
    mla,
    moe,
    network,
    optimizer,
    recompute,
    regularization,
    run,
    tokenizer,
    validation,
)

GROUPS: tuple[Group, ...] = tuple(
    module.GROUP
    for module in (
        network,
        regularization,
        run,
        recompute,
        kernels,
        optimizer,
        diagnostics,
        initialization,
        learning_rate,
        checkpointing,
        mixed_precision,
        distributed,
        validation,
        data,
        tokenizer,
        moe,
        mla,
        logging,
        experimental,
    )
)
