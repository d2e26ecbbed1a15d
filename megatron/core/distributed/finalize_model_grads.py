"""The last word on gradients, between backward and the optimizer's step."""

import torch
from torch import Tensor


def finalize_model_grads(model: list[torch.nn.Module], num_tokens: Tensor | None = None) -> None:
    """Finishes the reduction of every chunk's gradients and, with ``num_tokens``, makes them a mean per
    token.

    Args:
        model: DDP-wrapped chunks.
        num_tokens: tokens that count in the loss of this step (one integer), or None if gradients are
            averaged already.

    Raises:
        TrainingError: NaN or Inf among the gradients, if the chunks check for that.
    """
    timers = model[0].config.timers
    if timers is not None:
        timers("all-grads-sync", log_level=1).start(barrier=model[0].config.barrier_with_L1_time)
    for chunk in model:
        chunk.finish_grad_sync()
    if timers is not None:
        timers("all-grads-sync").stop()
    if num_tokens is not None:
        # Without any token the gradients are zero, and stay so.
        mean = 1.0 / num_tokens.clamp(min=1).float().squeeze()
        for chunk in model:
            chunk.scale_gradients(mean)
