"""Training in fp32: the model's parameters are updated directly."""

from typing import Any

from megatron.core.optimizer.base import MegatronOptimizer
from megatron.core.optimizer.inner_state import load_inner_state
from megatron.core.optimizer.timing import timed


class FP32Optimizer(MegatronOptimizer):
    """No copies, no loss scale."""

    def prepare_grads(self) -> bool:
        return self.unscale_grads()

    def unscale_grads(self) -> bool:
        with timed(self.config, "optimizer-copy-to-main-grad"):
            for param in self.get_parameters():
                if hasattr(param, "main_grad"):
                    param.grad = param.main_grad
        return False

    def update_loss_scale(self, found_inf: bool) -> None:
        """There is no loss scale."""

    def step_with_ready_grads(self) -> bool:
        self.require_rates()
        with timed(self.config, "optimizer-inner-step"):
            self.optimizer.step()
        for param in self.get_parameters():
            if hasattr(param, "main_grad"):
                param.grad = (
                    None  # or the next backward would add into the main gradient behind the wrapper's back
                )
        return True

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def reload_model_params(self) -> None:
        """The model's parameters are the optimizer's own."""

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        load_inner_state(self.optimizer, state_dict)
