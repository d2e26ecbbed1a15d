"""Experts that every token goes to, in one MLP."""

import copy
from typing import Any

from torch import Tensor, nn

from megatron.core import accelerator
from megatron.core.errors import ConfigError, UsageError
from megatron.core.tensor_parallel.initial_weights import Place, new_weight
from megatron.core.tensor_parallel.layers import LinearBase
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils.tensors import mark


class SharedExpertMLP(MLP):
    """An MLP of width ``config.moe_shared_expert_intermediate_size``, split as dense layers are.

    With ``config.moe_shared_expert_overlap`` the dispatcher calls, while tokens travel and in this order,
    ``pre_forward_comm``, ``linear_fc1_forward_and_act``, ``linear_fc2_forward``, ``post_forward_comm`` and
    ``get_output``; on an accelerator they run on a stream of their own. Otherwise the layer calls it.

    Attributes:
        stream: that stream; None on a CPU.
        gate_weight: [1, h], or None.

    Args:
        config: model config.
        submodules: the two projections.
        gate: multiply the output by sigmoid(x gate_weight^T); also with ``config.moe_shared_expert_gate``.
    """

    stream: Any = None

    def __init__(self, config: TransformerConfig, submodules: MLPSubmodules, gate: bool = False):
        if config.moe_shared_expert_intermediate_size is None:
            raise ConfigError("moe_shared_expert_intermediate_size: unset, but the layer has shared experts")
        own = copy.copy(config)
        own.ffn_hidden_size, own.add_bias_linear = config.moe_shared_expert_intermediate_size, False
        super().__init__(own, submodules)
        self.use_shared_expert_gate = gate or config.moe_shared_expert_gate
        self.gate_weight: nn.Parameter | None = None
        if self.use_shared_expert_gate:
            assert config.init_method is not None, "the config fills it in"
            self.gate_weight, _ = new_weight(
                config, (1, config.hidden_size), None, config.init_method, Place(0, 1)
            )
            # It sees a part of the sequence on every rank, and its gradients are summed over them.
            mark(self.gate_weight, sequence_parallel=config.sequence_parallel)
        if config.moe_shared_expert_overlap:
            for module in self.modules():
                if isinstance(module, LinearBase):
                    module.leave_communication_to_caller()
            self.stream = accelerator.new_stream()
        self._held: Tensor | None = None
        self._gate: Tensor | None = None

    def forward(self, hidden_states: Tensor, per_token_scale: Tensor | None = None) -> Any:
        """[s, b, h] -> [s, b, h], without a bias."""
        output, _ = super().forward(hidden_states)
        return output if self.gate_weight is None else output * self._gate_of(hidden_states)

    def _gate_of(self, hidden_states: Tensor) -> Tensor:
        """[s, b, h] -> [s, b, 1]"""
        assert self.gate_weight is not None, "called where there is one"
        return nn.functional.linear(hidden_states, self.gate_weight).sigmoid()

    # ---- the parts that a dispatcher calls ----

    def pre_forward_comm(self, input: Tensor) -> None:
        """Collects the input of this rank's part of the width, and finds the gate.  input: [s, b, h]"""
        if not self.config.moe_shared_expert_overlap:
            raise UsageError("shared experts run in parts only with moe_shared_expert_overlap=True")
        if self.stream is not None:
            self.stream.wait_stream(accelerator.current_stream())
        with accelerator.use_stream(self.stream):
            self._gate = None if self.gate_weight is None else self._gate_of(input)
            if self.config.sequence_parallel:
                # [s/TP, b, h] -> [s, b, h]
                self._held = gather_from_sequence_parallel_region(input)
            else:
                self._held = copy_to_tensor_model_parallel_region(input)

    def linear_fc1_forward_and_act(self, overlapped_comm_output: Tensor | None = None) -> None:
        """First projection and activation, behind the exchange that gave ``overlapped_comm_output``."""
        with accelerator.use_stream(self.stream):
            inner, bias = self.linear_fc1(self._take())
            self._held = self._activate(inner, bias)

    def linear_fc2_forward(self, overlapped_comm_output: Tensor | None = None) -> None:
        """Second projection."""
        with accelerator.use_stream(self.stream):
            self._held, _ = self.linear_fc2(self._take())

    def post_forward_comm(self) -> None:
        """Sums the ranks' parts of the width."""
        with accelerator.use_stream(self.stream):
            if self.config.sequence_parallel:
                # [s, b, h] -> [s/TP, b, h]
                self._held = reduce_scatter_to_sequence_parallel_region(self._take())
            else:
                self._held = reduce_from_tensor_model_parallel_region(self._take())

    def get_output(self) -> Tensor:
        """The result, [s, b, h]; the current stream waits for it."""
        with accelerator.use_stream(self.stream):
            output = self._take()
            if self._gate is not None:
                output, self._gate = output * self._gate, None
        if self.stream is not None:
            current = accelerator.current_stream()
            assert current is not None, "an accelerator has one"
            current.wait_stream(self.stream)
            output.record_stream(current)
        return output

    def _take(self) -> Tensor:
        if self._held is None:
            raise UsageError("the parts of shared experts run in order, after pre_forward_comm()")
        held, self._held = self._held, None
        return held


# ---- For scripts written for Megatron-LM: nothing in this project calls what follows ----


def set_tensor_grad_fn_sequence_sr(tensor: Tensor, value: int) -> None:
    """Asks autograd to run the node behind ``tensor`` earlier (larger ``value``) or later than others.

    Autograd runs ready nodes with larger sequence numbers first; without a node there is nothing to do.
    """
    node = tensor.grad_fn
    if node is not None:
        node._set_sequence_nr(value)  # pyright: ignore[reportAttributeAccessIssue]  (torch does not declare it)
