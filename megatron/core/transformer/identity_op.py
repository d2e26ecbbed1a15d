"""Modules that do nothing: what an empty slot of a layer spec holds."""

from collections.abc import Callable
from typing import Any

import torch


class IdentityOp(torch.nn.Module):
    """Returns its first argument; may be constructed with anything."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__()

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        return x


class IdentityFuncOp(IdentityOp):
    """Called, returns a function that returns its first argument (as a bias-dropout-add slot must)."""

    def forward(self, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        return super().forward
