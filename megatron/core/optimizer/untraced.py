"""Torch's optimizers without the import of its compiler.

torch marks the bookkeeping methods of an optimizer as not to be traced by ``torch.compile``. The first call
of a method so marked imports the whole compiler: 1 to 3 s at the start of every process, for a run that
compiles nothing.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch


class Untraced(torch.optim.Optimizer):
    """Mix-in that calls the bookkeeping methods as they were before they were marked."""

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)


class SGD(Untraced, torch.optim.SGD):
    """``torch.optim.SGD``."""

    _untraced_step = inspect.unwrap(torch.optim.SGD.step)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every parameter that has a gradient; returns what ``closure`` returned."""
        return self._untraced_step(closure)
