"""Pipeline parallelism: schedules as lists of actions, and what runs them.

What plans, proves and plays schedules does without torch.
"""

from typing import Any

__all__ = ["get_forward_backward_func"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from megatron.core.pipeline_parallel import schedules

    return getattr(schedules, name)
