"""Losses of layers that predict further tokens: their targets, their gradients, their figures in the log."""

from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core import parallel_state
from megatron.core.context_parallel.zigzag import own_place, shift_left


def roll_tensor(tensor: Tensor, shifts: int = -1, dims: int = -1) -> tuple[Tensor, Tensor]:
    """Shifts along a dimension and fills what becomes free with zeros.

    Returns:
        The shifted tensor, of the same shape, and the sum of its elements.
    """
    rolled = torch.roll(tensor, shifts, dims)
    length = tensor.shape[dims]
    free = min(abs(shifts), length)
    rolled.narrow(dims, length - free if shifts < 0 else 0, free).zero_()
    return rolled, rolled.sum()


def next_tokens(ids: Tensor) -> Tensor:
    """What follows each position; 0 after the last one.  [.., s] -> [.., s]

    Ranks that hold parts of one sequence exchange the first elements of these parts.
    """
    return shift_left(ids) if own_place()[1] > 1 else roll_tensor(ids)[0]


class MTPLossAutoScaler(torch.autograd.Function):
    """Lets a loss take part in backward without being part of the value that is differentiated.

    ``apply(output, mtp_loss)`` returns ``output``; its backward gives ``mtp_loss`` the gradient that the main
    loss has: the factor that it is multiplied by on its way to a mean over micro-batches.
    """

    main_loss_backward_scale: ClassVar[Tensor] = torch.tensor(1.0)

    @staticmethod
    def forward(ctx: Any, output: Tensor, mtp_loss: Tensor) -> Tensor:
        ctx.save_for_backward(mtp_loss)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor]:
        (mtp_loss,) = ctx.saved_tensors
        scale = MTPLossAutoScaler.main_loss_backward_scale
        return grad_output, torch.ones_like(mtp_loss) * scale.to(mtp_loss.device, mtp_loss.dtype)

    @staticmethod
    def set_loss_scale(scale: Tensor) -> None:
        """Sets the gradient of the losses, for all backward passes until the next call.

        Args:
            scale: one element; what a mean loss of a micro-batch is multiplied by before backward.
        """
        MTPLossAutoScaler.main_loss_backward_scale = scale


class MTPLossLoggingHelper:
    """Collects the loss of each depth over the micro-batches of a step. Nothing here has instances."""

    tracker: ClassVar[dict[str, Any]] = {}

    @staticmethod
    def save_loss_to_tracker(
        loss: Tensor,
        layer_number: int,
        num_layers: int,
        reduce_group: ProcessGroup | None = None,
        avg_group: ProcessGroup | None = None,
    ) -> None:
        """Adds the loss of one micro-batch.

        Args:
            loss: 0-dim.
            layer_number: of the depth, from 0.
            num_layers: how many depths there are.
            reduce_group: ranks whose losses add up.
            avg_group: ranks over which the losses are averaged.
        """
        tracker = MTPLossLoggingHelper.tracker
        if "values" not in tracker:
            tracker["values"] = torch.zeros(num_layers, device=loss.device)
        tracker["values"][layer_number] += loss.detach()
        tracker["reduce_group"], tracker["avg_group"] = reduce_group, avg_group

    @staticmethod
    def clean_loss_in_tracker() -> None:
        """Forgets everything: a step begins."""
        MTPLossLoggingHelper.tracker.clear()

    @staticmethod
    def reduce_loss_in_tracker() -> None:
        """Sums and averages the values over the groups they came with.

        Only stages that hold layers of this kind have values; they alone take part.
        """
        tracker = MTPLossLoggingHelper.tracker
        if "values" not in tracker:
            return
        if tracker["reduce_group"] is not None:
            dist.all_reduce(tracker["values"], group=tracker["reduce_group"])
        group = tracker["avg_group"]
        if group is not None and group.size() > 1:
            dist.all_reduce(tracker["values"], group=group)
            tracker["values"] /= group.size()

    @staticmethod
    def track_mtp_metrics(
        loss_scale: Tensor | float,
        iteration: int,
        writer: Any,
        wandb_writer: Any = None,
        total_loss_dict: dict[str, Any] | None = None,
    ) -> None:
        """Reports the losses of a step as ``mtp_1 loss``, ``mtp_2 loss``, ..., and forgets them.

        Args:
            loss_scale: what the collected sums are multiplied by: 1 / number of micro-batches.
            iteration: x of the points.
            writer, wandb_writer: take one point per loss; or None.
            total_loss_dict: sums since the last log line, to which the losses are added; or None.
        """
        MTPLossLoggingHelper.reduce_loss_in_tracker()
        values = MTPLossLoggingHelper.tracker.get("values")
        if values is not None:
            for depth, loss in enumerate((values * loss_scale).tolist(), 1):
                name = f"mtp_{depth} loss"
                if total_loss_dict is not None:
                    total_loss_dict[name] = total_loss_dict.get(name, 0.0) + loss
                if writer is not None:
                    writer.add_scalar(name, loss, iteration)
                if wandb_writer is not None:
                    wandb_writer.log({name: loss}, iteration)
        MTPLossLoggingHelper.clean_loss_in_tracker()


def attach_loss(
    output: Tensor,
    per_token: Tensor,
    mask: Tensor,
    depth: int,
    depths: int,
    factor: float,
    per_token_mean: bool,
) -> Tensor:
    """``output``, whose backward also differentiates the loss of one depth, and notes that loss for the log.

    Args:
        output: any tensor that the main loss depends on.
        per_token: [b, s] losses of this rank's tokens.
        mask: [b, s], 1 where a token counts.
        depth: from 0.
        depths: how many there are.
        factor: weight of the mean over all depths.
        per_token_mean: gradients are divided by the tokens of the whole step at its end, so what is
            differentiated is a sum.
    """
    mask = mask.float()
    total, count = (per_token.float() * mask).sum(), mask.sum()
    group, parts = None, 1
    if parallel_state.model_parallel_is_initialized():
        parts = parallel_state.get_context_parallel_world_size()
        if parts > 1:
            # Ranks that share a sequence have parts of one mean, whose gradients add up.
            dist.all_reduce(count, group=parallel_state.get_context_parallel_group())
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    mean = total / count.clamp(min=1)
    MTPLossLoggingHelper.save_loss_to_tracker(mean.detach() * parts, depth, depths, avg_group=group)
    return MTPLossAutoScaler.apply(output, factor / depths * (total if per_token_mean else mean))
