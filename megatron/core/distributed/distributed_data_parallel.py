"""The wrapper that collects a model's gradients for the optimizer."""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from megatron.core import parallel_state
from megatron.core.config_logger import has_config_logger_enabled, log_config_to_disk
from megatron.core.distributed.data_parallel_base import _BaseDataParallel
from megatron.core.distributed.distributed_data_parallel_config import DistributedDataParallelConfig
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBuffer
from megatron.core.errors import NotBuiltYetError
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import log_single_rank

logger = logging.getLogger(__name__)

# Field of the configuration -> (feature, flag) of what has no code yet.
_NOT_BUILT = {
    "use_distributed_optimizer": ("the distributed optimizer", "--use-distributed-optimizer"),
    "overlap_param_gather": ("gathering parameters during forward", "--overlap-param-gather"),
    "fp8_param_gather": ("gathering parameters in fp8", "--fp8-param-gather"),
    "use_custom_fsdp": ("fully sharded data parallelism", "--use-custom-fsdp"),
}
# Mixed-type addition makes a temporary of the whole operand on a CPU; beyond some 32 MiB that memory comes
# fresh from the kernel every time, at 6 times the cost of the addition itself.
_ADDITION_PIECE = 1 << 20


class DistributedDataParallel(_BaseDataParallel):
    """Adds the gradients of all micro-batches of a step up in contiguous buffers.

    After backward a parameter's gradient is in ``param.main_grad`` and ``param.grad`` is None. A layer that
    adds its weight gradient into ``main_grad`` itself says so by ``param.grad_added_to_main_grad = True``;
    what autograd delivers for that parameter is ignored then, unless the layer also set
    ``param.zero_out_wgrad``.

    Args:
        config: of the model.
        ddp_config: settings of this wrapper.
        module: the model, on its device, with its final types.
        disable_bucketing: reduce all gradients at once (with one data-parallel rank there is nothing to
            reduce).

    Attributes:
        buffers: gradients, one buffer per (parameter type, gradient type).

    Raises:
        NotBuiltYetError: several data-parallel ranks, or a setting whose code does not exist yet.
    """

    def __init__(
        self,
        config: TransformerConfig,
        ddp_config: DistributedDataParallelConfig,
        module: torch.nn.Module,
        disable_bucketing: bool = False,
    ):
        super().__init__(config=config, module=module)
        _refuse_what_is_not_built(ddp_config)
        if has_config_logger_enabled(config):
            log_config_to_disk(config, {"ddp_config": ddp_config}, prefix="DistributedDataParallel")
        log_single_rank(logger, logging.INFO, "data parallelism: %s", ddp_config)
        self.ddp_config = ddp_config
        self.disable_bucketing = disable_bucketing
        self.is_last_microbatch = True
        self._grads_checked = False
        self._params = [param for param in module.parameters() if param.requires_grad]
        self.buffers = _build_buffers(self._params, ddp_config.grad_reduce_in_fp32)
        self._hooks = [param.register_post_accumulate_grad_hook(_add_to_main_grad) for param in self._params]
        self._reset_flags()

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Context of all micro-batches but the last."""
        self.is_last_microbatch = False
        try:
            yield
        finally:
            self.is_last_microbatch = True

    def start_grad_sync(self, *unused: Any) -> None:
        """Checks the gradients as configured; a single data-parallel rank has nothing to reduce.

        Raises:
            TrainingError: NaN or Inf among them.
        """
        check_nan, check_large = self.ddp_config.check_for_nan_in_grad, self.ddp_config.check_for_large_grads
        if check_nan or check_large:
            for buffer in self.buffers:
                buffer.check_grads(check_nan, check_large)
        self._grads_checked = True

    def finish_grad_sync(self) -> None:
        """Makes sure that :meth:`start_grad_sync` has been done for this step."""
        if not self._grads_checked:
            self.start_grad_sync()
        self._grads_checked = False

    def scale_gradients(self, scaling_factor: float | Tensor) -> None:
        """Multiplies all gradients by a number or a 0-dim tensor."""
        for buffer in self.buffers:
            buffer.scale_gradients(scaling_factor)

    def zero_grad_buffer(self) -> None:
        """Sets all gradients to zero, for a new step."""
        for buffer in self.buffers:
            buffer.reset()
        self._grads_checked = False
        self._reset_flags()

    def broadcast_params(self) -> None:
        """Nothing to do: the only data-parallel rank is the first."""

    def _reset_flags(self) -> None:
        for param in self._params:
            param.grad_added_to_main_grad = False


def _refuse_what_is_not_built(ddp_config: DistributedDataParallelConfig) -> None:
    for field, (feature, flag) in _NOT_BUILT.items():
        if getattr(ddp_config, field):
            raise NotBuiltYetError(feature, flag, f"Leave {flag} out.")
    if parallel_state.is_initialized():
        ranks = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
        if ranks > 1:
            raise NotBuiltYetError(
                f"reducing gradients over {ranks} data-parallel ranks", None, "Start one process."
            )


def _build_buffers(params: list[torch.nn.Parameter], grads_in_fp32: bool) -> list[_ParamAndGradBuffer]:
    """One buffer per pair of types, in order of first appearance."""
    by_types: dict[tuple[torch.dtype, torch.dtype], list[torch.nn.Parameter]] = {}
    for param in params:
        grad_dtype = torch.float32 if grads_in_fp32 else param.dtype
        by_types.setdefault((param.dtype, grad_dtype), []).append(param)
    buffers = []
    for (param_dtype, grad_dtype), members in by_types.items():
        buffers.append(_ParamAndGradBuffer(param_dtype, grad_dtype, members))
        log_single_rank(
            logger,
            logging.INFO,
            "gradient buffer: %d elements of %s for %d parameters of %s",
            buffers[-1].numel,
            grad_dtype,
            len(members),
            param_dtype,
        )
    return buffers


@torch.no_grad()
def _add_to_main_grad(param: torch.nn.Parameter) -> None:
    """Hook that runs when autograd has finished a parameter's gradient of one micro-batch."""
    # zero_out_wgrad: the layer added its part itself, and delivered zeros in its place; the rest is another
    # use's.
    if not param.grad_added_to_main_grad or getattr(param, "zero_out_wgrad", False):
        _accumulate(param.main_grad, param.grad)
    param.grad = None


def _accumulate(main_grad: Tensor, grad: Tensor) -> None:
    """``main_grad += grad``, of any two types."""
    if main_grad.dtype == grad.dtype or main_grad.numel() <= _ADDITION_PIECE:
        main_grad.add_(grad)
        return
    pieces = zip(
        main_grad.view(-1).split(_ADDITION_PIECE), grad.reshape(-1).split(_ADDITION_PIECE), strict=True
    )
    for main_piece, piece in pieces:
        main_piece.add_(piece)
