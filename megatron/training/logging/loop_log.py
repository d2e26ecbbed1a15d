"""What the training loop keeps between its log lines, and asks of the model and the optimizer for each."""

from typing import Any

import torch

from megatron.training.logging.step_log import explain_skipped_step, training_log
from megatron.training.schedule_hooks import gathered_parameters
from megatron.training.utils import calc_params_l2_norm, print_rank_last


class LoopLog:
    """What is kept between the log lines of a run, and asked from model and optimizer for each."""

    def __init__(self, args: Any, model: list[torch.nn.Module], optimizer: Any):
        self._args, self._model, self._optimizer = args, model, optimizer
        self._totals: dict[str, Any] = {}
        self._report_memory = True
        self._loss_scale = optimizer.get_loss_scale().item()
        self._steps = self._skipped = 0

    def write(self, iteration: int, result: tuple[Any, ...]) -> None:
        """Count one step and print its line when that is due; all ranks call this together.

        ``result`` is what ``train_step`` returned.
        """
        losses, skipped, _, _, _, grad_norm, num_zeros = result
        used_scale, self._loss_scale = self._loss_scale, self._optimizer.get_loss_scale().item()
        self._steps += 1
        self._skipped += skipped
        if skipped and self._skipped == 1:
            explain_skipped_step(self._args, iteration, used_scale)
        params_norm = None
        if self._args.log_params_norm:
            with gathered_parameters(self._model):
                params_norm = calc_params_l2_norm(self._model)
        self._report_memory = training_log(
            losses,
            self._totals,
            *_learning_rates(self._optimizer),
            iteration,
            self._loss_scale,
            self._report_memory,
            skipped,
            grad_norm,
            params_norm,
            num_zeros,
        )

    def close(self) -> None:
        """Say so if nothing was trained."""
        if self._steps and self._skipped == self._steps:
            print_rank_last(
                f"WARNING: all {self._steps} steps of this run were skipped, the weights are as before: "
                "train longer, or start at a smaller loss scale"
            )


def _learning_rates(optimizer: Any) -> tuple[float | None, float | None]:
    """Rates in force for the next step: (ordinary groups, decoupled groups)."""
    rates: dict[bool, float] = {}
    for group in optimizer.param_groups:
        rates[bool(group["is_decoupled_lr"])] = group["lr"]
    return rates.get(False), rates.get(True)
