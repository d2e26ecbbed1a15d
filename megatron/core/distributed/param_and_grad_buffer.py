"""Contiguous gradient buffers, one per pair of parameter type and gradient type."""

import functools

import torch
from torch import Tensor

from megatron.core.optimizer.multi_tensor import l2_norm
from megatron.core.rerun_state_machine import get_rerun_state_machine

# A gradient of this many times the usual norm is worth a warning.
_LARGE_GRAD_FACTOR = 10


class _ParamAndGradBuffer:
    """Gradients of ``params`` in one tensor, in REVERSED order: backward fills it roughly from its start.

    Every parameter gets an attribute ``main_grad``, its view into the buffer.

    Args:
        param_dtype: type of the parameters.
        grad_dtype: type of the gradients.
        params: in the order of registration, all on one device.

    Attributes:
        grad_data: [numel] the gradients.
        param_index_map: where each parameter's gradient lies: (start, end).
    """

    def __init__(self, param_dtype: torch.dtype, grad_dtype: torch.dtype, params: list[torch.nn.Parameter]):
        self.param_dtype = param_dtype
        self.grad_dtype = grad_dtype
        self.params = list(reversed(params))
        self.numel = sum(param.numel() for param in params)
        self.numel_unpadded = self.numel
        self.grad_data = torch.zeros(self.numel, dtype=grad_dtype, device=params[0].device)
        self.param_index_map: dict[torch.nn.Parameter, tuple[int, int]] = {}
        start = 0
        for param in self.params:
            end = start + param.numel()
            self.param_index_map[param] = (start, end)
            param.main_grad = self.grad_data[start:end].view(param.shape)
            start = end

    def reset(self) -> None:
        """Sets all gradients to zero."""
        self.grad_data.zero_()

    def scale_gradients(self, scaling_factor: float | Tensor) -> None:
        """Multiplies all gradients by a number or a 0-dim tensor."""
        self.grad_data.mul_(scaling_factor)

    def check_grads(self, check_for_nan_or_inf: bool, check_for_large: bool) -> None:
        """Looks at the L2 norm of the buffer.

        Raises:
            TrainingError: it is NaN or Inf, if that is to be checked.
        """
        machine = get_rerun_state_machine()
        norm = l2_norm([self.grad_data])
        where = f"in the local norm of the {self.grad_dtype} gradients after backward"
        if check_for_nan_or_inf:
            machine.validate_result(norm, rejection_func=torch.isnan, message=f"found NaN {where}")
            machine.validate_result(norm, rejection_func=torch.isinf, message=f"found Inf {where}")
        if check_for_large:
            is_large = functools.partial(
                machine.is_unexpectedly_large, threshold=_LARGE_GRAD_FACTOR, context="grads"
            )
            machine.validate_result(
                norm, rejection_func=is_large, message=f"found unexpectedly large value {where}", fatal=False
            )
