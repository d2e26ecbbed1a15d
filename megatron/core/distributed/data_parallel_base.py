"""What every data-parallel wrapper offers to schedules and training loops."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig


class _BaseDataParallel(MegatronModule):
    """Wraps ``module`` without adding a prefix to its state; synchronisation does nothing here."""

    def __init__(self, config: TransformerConfig, module: torch.nn.Module):
        super().__init__(config=config)
        self.module = module

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """Calls the wrapped module."""
        return self.module(*inputs, **kwargs)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Context of micro-batches after which gradients are not reduced yet."""
        yield

    def start_grad_sync(self, *unused: Any) -> None:
        """Begins to reduce the gradients."""

    def finish_grad_sync(self) -> None:
        """Waits until the gradients are reduced."""

    def scale_gradients(self, scaling_factor: float) -> None:
        """Multiplies all gradients."""

    def zero_grad_buffer(self) -> None:
        """Sets all gradients to zero, for a new step."""

    def broadcast_params(self) -> None:
        """Makes the parameters of all data-parallel ranks equal to the first one's."""

    def state_dict(
        self, prefix: str = "", keep_vars: bool = False, destination: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """State of the wrapped module."""
        module: Any = self.module
        return module.state_dict(prefix=prefix, keep_vars=keep_vars, destination=destination)

    def state_dict_for_save_checkpoint(self, prefix: str = "", keep_vars: bool = False) -> dict[str, Any]:
        """State of the wrapped module for a checkpoint."""
        module: Any = self.module
        return module.state_dict_for_save_checkpoint(prefix=prefix, keep_vars=keep_vars)

    def load_state_dict(self, state_dict: dict[str, Any], strict: bool = True) -> Any:
        """Loads state into the wrapped module."""
        return self.module.load_state_dict(state_dict, strict=strict)
