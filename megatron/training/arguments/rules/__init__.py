"""The rules a set of arguments must obey.  Each returns a list of problems, and never raises."""

from megatron.training.arguments.rules import (
    bounds,
    checkpoint,
    data,
    length,
    model,
    parallel,
    precision,
    run,
    schedule,
)

RULES = (
    *bounds.RULES,
    *model.RULES,
    *parallel.RULES,
    *precision.RULES,
    *length.RULES,
    *schedule.RULES,
    *checkpoint.RULES,
    *data.RULES,
    *run.RULES,
)
