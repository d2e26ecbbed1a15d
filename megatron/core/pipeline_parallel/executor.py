"""Runs the schedule of a pipeline stage: any list of actions.

Transfers are waited for where what they bring is needed, never where they are started; what is sent stays
in memory until it has left. So each transfer has as long as the schedule leaves it, and a rank never
stands still for the sake of another's order.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron.core import parallel_state
from megatron.core.errors import UsageError
from megatron.core.pipeline_parallel.actions import (
    Action,
    Compute,
    Direction,
    Exchange,
    Message,
    PassKind,
    StartSync,
)
from megatron.core.pipeline_parallel.transport import (
    Pending,
    Transfer,
    announce_shapes,
    as_sent,
    receive_buffer,
    start,
)
from megatron.core.tensor_parallel import deferred_gradients
from megatron.core.tensor_parallel.replica_streams import replica_streams
from megatron.core.timers import timed
from megatron.core.utils import assert_viewless_tensor, make_viewless_tensor

# (micro-batch, chunk)
_Place = tuple[int, int]

# Exchanges under way at a time. What is sent stays in memory until it has left, and not every backend tells
# when that is without being waited for; waiting is safe: every exchange can end before the next one starts.
_MOST_PENDING = 4

_TIMERS = {
    Direction.ACTIVATION_OUT: "forward-send",
    Direction.ACTIVATION_IN: "forward-recv",
    Direction.GRADIENT_OUT: "backward-send",
    Direction.GRADIENT_IN: "backward-recv",
    Direction.ACTIVATION_OUT | Direction.ACTIVATION_IN: "forward-send-forward-recv",
    Direction.ACTIVATION_OUT | Direction.GRADIENT_IN: "forward-send-backward-recv",
    Direction.GRADIENT_OUT | Direction.ACTIVATION_IN: "backward-send-forward-recv",
    Direction.GRADIENT_OUT | Direction.GRADIENT_IN: "backward-send-backward-recv",
}
_TIMER_OF_THE_REST = "forward-backward-send-forward-backward-recv"


@dataclass(frozen=True)
class StepInputs:
    """What a schedule is run on.

    Attributes:
        forward_step, backward_step: those of :mod:`schedules`: one micro-batch on one chunk.
        forward_step_func: ``(data_iterator, model) -> (output, loss_func)``.
        data_iterators, models: one per chunk of this rank.
        num_microbatches: of the step.
        tensor_shapes: of what stages send each other, one per tensor.
        config: of the first chunk.
        forward_only, collect_non_loss_data, first_val_step: as of the public functions.
    """

    forward_step: Callable
    backward_step: Callable
    forward_step_func: Callable
    data_iterators: Sequence[Iterator | None]
    models: Sequence[torch.nn.Module]
    num_microbatches: int
    tensor_shapes: Sequence[Sequence[int]]
    config: Any
    forward_only: bool = False
    collect_non_loss_data: bool = False
    first_val_step: bool | None = None


def run_schedule(actions: Sequence[Action], step: StepInputs) -> list[Any]:
    """Runs all actions of this rank, then finalizes the gradients.

    Returns:
        One report per micro-batch where the losses are made, [] elsewhere.
    """
    runner = _Runner(step, actions)
    # An evaluation draws nothing, and leaves the streams as they are.
    with contextlib.nullcontext() if step.forward_only else replica_streams():
        for action in actions:
            if isinstance(action, Compute):
                runner.compute(action)
            elif isinstance(action, Exchange):
                runner.exchange(action)
            else:
                runner.start_sync(action)
    runner.finish()
    return runner.reports


class _Runner:
    """The tensors and transfers of one step on one rank."""

    def __init__(self, step: StepInputs, actions: Sequence[Action]):
        self.step, self.config = step, step.config
        self.reports: list[Any] = []
        self.total_tokens = torch.zeros((), dtype=torch.int64)
        # What is held of a micro-batch between its forward and its backward pass.
        self.inputs: dict[_Place, list[Tensor | None]] = {}
        self.outputs: dict[_Place, list[Tensor]] = {}
        # (gradient?, micro-batch, chunk) -> tensors to send, and tensors received or on their way.
        self.outgoing: dict[tuple[bool, int, int], list[Tensor]] = {}
        self.incoming: dict[tuple[bool, int, int], tuple[list[Tensor], Pending]] = {}
        self.pending: list[Pending] = []
        self.put_off: dict[_Place, int] = {}
        self.num_forwards = 0
        # Forward passes before the first backward pass: the most micro-batches ever in flight.
        kinds = [action.kind for action in actions if isinstance(action, Compute)]
        self.most_in_flight = next(
            (n for n, kind in enumerate(kinds) if kind is not PassKind.FORWARD), len(kinds)
        )
        self.has_virtual_stages = parallel_state.get_virtual_pipeline_model_parallel_world_size() is not None
        # One chunk on the first stage: the step ends with its last backward pass, which can hide the
        # reduction. Elsewhere the reduction starts by a call, at a time that suits all stages.
        is_first = len(step.models) == 1 and _pipeline_rank() == 0
        self.reduces_by_call = self.config.grad_sync_func is not None and not is_first
        deferred_gradients.discard()

    def compute(self, action: Compute) -> None:
        """Runs one computation."""
        if self.has_virtual_stages:
            parallel_state.set_virtual_pipeline_model_parallel_rank(action.chunk)
        with self._reduction_held_back(action):
            if action.kind is PassKind.FORWARD:
                self._forward(action.microbatch, action.chunk)
            elif action.kind is PassKind.WEIGHT_GRADIENT:
                deferred_gradients.run(self.put_off.pop((action.microbatch, action.chunk)))
            else:
                self._backward(action)

    def exchange(self, exchange: Exchange) -> None:
        """Starts transfers; frees outputs that are on their way."""
        directions = Direction(0)
        for message in exchange.messages:
            directions |= message.direction
        name = _TIMERS.get(directions, _TIMER_OF_THE_REST)
        with timed(self.config, name, log_level=2):
            self.pending = [pending for pending in self.pending if not pending.is_done()]
            while len(self.pending) >= _MOST_PENDING:
                self.pending.pop(0).wait()
            tensors = self._tensors_of(exchange.messages)
            transfers = [
                Transfer(tensor.detach(), message.peer, message.send)
                for message, group in zip(exchange.messages, tensors, strict=True)
                for tensor in group
            ]
            pending = start(transfers, self.config)
        self.pending.append(pending)
        for message, group in zip(exchange.messages, tensors, strict=True):
            key = (message.gradient, message.microbatch, message.chunk)
            if not message.send:
                self.incoming[key] = (group, pending)
            elif not message.gradient:
                self._free_output(message.microbatch, message.chunk)

    def start_sync(self, action: StartSync) -> None:
        """Starts a data-parallel collective of a chunk, where the configuration has a function for it."""
        if self.step.forward_only and action.gradients:
            return
        functions = self.config.grad_sync_func if action.gradients else self.config.param_sync_func
        if functions is None or (action.gradients and not self.reduces_by_call):
            return
        _of_chunk(functions, action.chunk)(self.step.models[action.chunk].parameters())

    def finish(self) -> None:
        """Waits for the last transfers, then hands the gradients to be finalized."""
        for pending in self.pending:
            pending.wait()
        if not self.step.forward_only:
            finalize_gradients(self.config, self.step.models, self.total_tokens)

    def _forward(self, microbatch: int, chunk: int) -> None:
        step = self.step
        inputs = self._received(False, microbatch, chunk) or [None]
        output, num_tokens = step.forward_step(
            step.forward_step_func,
            step.data_iterators[chunk],
            step.models[chunk],
            step.num_microbatches,
            inputs,
            self.reports,
            self.config,
            step.collect_non_loss_data,
            self._recomputes(),
            check_first_val_step(step.first_val_step, step.forward_only, microbatch == 0),
            microbatch,
        )
        self.num_forwards += 1
        if self._is_last(chunk):
            # The loss function's count is on the device. Asking for its value here would stop the host.
            self.total_tokens = num_tokens + self.total_tokens
        else:
            output = [
                make_viewless_tensor(tensor, tensor.requires_grad, keep_graph=True) for tensor in output
            ]
            self.outgoing[False, microbatch, chunk] = output
        if not step.forward_only:
            self.inputs[microbatch, chunk], self.outputs[microbatch, chunk] = inputs, output

    def _backward(self, action: Compute) -> None:
        place = (action.microbatch, action.chunk)
        grads = self._received(True, *place) or [None]
        inputs, outputs = self.inputs.pop(place), self.outputs.pop(place)
        splits = action.kind is PassKind.INPUT_GRADIENT
        before = deferred_gradients.pending()
        with deferred_gradients.deferring() if splits else contextlib.nullcontext():
            input_grads = self.step.backward_step(inputs, outputs, grads, None, self.config)
        if splits:
            self.put_off[place] = deferred_gradients.pending() - before
        if inputs[0] is not None:
            if any(grad is None for grad in input_grads):
                raise UsageError(
                    f"chunk {action.chunk} of this stage does not use what the previous stage sends: its "
                    "set_input_tensor() must hand it to forward()"
                )
            self.outgoing[True, action.microbatch, action.chunk] = input_grads

    def _is_last(self, chunk: int) -> bool:
        return chunk == len(self.step.models) - 1 and _pipeline_rank() == _pipeline_size() - 1

    def _recomputes(self) -> bool | None:
        """Third argument of the forward function: whether to recompute this micro-batch in full."""
        partial = self.config.num_microbatches_with_partial_activation_checkpoints
        if partial is None:
            return None
        return self.num_forwards % self.most_in_flight >= partial

    def _reduction_held_back(self, action: Compute) -> contextlib.AbstractContextManager[Any]:
        """Context in which gradients are not reduced, unless they are complete with this micro-batch."""
        is_last = action.microbatch == self.step.num_microbatches - 1
        if self.config.no_sync_func is None or (is_last and not self.reduces_by_call):
            return contextlib.nullcontext()
        return _of_chunk(self.config.no_sync_func, action.chunk)()

    def _received(self, gradient: bool, microbatch: int, chunk: int) -> list[Tensor] | None:
        """Tensors from another stage, once they are there; None where none were to come."""
        found = self.incoming.pop((gradient, microbatch, chunk), None)
        if found is None:
            return None
        tensors, pending = found
        with timed(self.config, "backward-recv" if gradient else "forward-recv", log_level=2):
            pending.wait_received()
        return tensors

    def _tensors_of(self, messages: Sequence[Message]) -> list[list[Tensor]]:
        """What each message sends, and memory for what it receives."""
        config, shapes = self.config, self.step.tensor_shapes
        sent = {
            m: [as_sent(tensor, config) for tensor in self.outgoing.pop((m.gradient, m.microbatch, m.chunk))]
            for m in messages
            if m.send
        }
        if config.variable_seq_lengths:
            outgoing = [tensor for tensors in sent.values() for tensor in tensors]
            places = [(m.peer, m.send) for m in messages for _ in shapes]
            announced = iter(announce_shapes(outgoing, places, config))
            return [
                sent[m] if m.send else [receive_buffer(next(announced), config) for _ in shapes]
                for m in messages
            ]
        for tensors in sent.values():
            _check_shapes(tensors, shapes)
        return [sent[m] if m.send else [receive_buffer(shape, config) for shape in shapes] for m in messages]

    def _free_output(self, microbatch: int, chunk: int) -> None:
        for tensor in self.outputs.get((microbatch, chunk), ()):
            if tensor.grad_fn is not None:
                deallocate_output_tensor(tensor, self.config.deallocate_pipeline_outputs)


def _check_shapes(tensors: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> None:
    found = [tuple(tensor.shape) for tensor in tensors]
    if found != [tuple(shape) for shape in shapes]:
        raise UsageError(
            f"a stage sends tensors of shapes {found}, but {[tuple(shape) for shape in shapes]} were "
            "announced: check seq_length and micro_batch_size, or set variable_seq_lengths=True"
        )


def _of_chunk(functions: Any, chunk: int) -> Callable:
    """A hook is one function, or a list with one per chunk."""
    return functions[chunk] if isinstance(functions, list | tuple) else functions


def _pipeline_rank() -> int:
    return parallel_state.get_pipeline_model_parallel_rank() if parallel_state.is_initialized() else 0


def _pipeline_size() -> int:
    return parallel_state.get_pipeline_model_parallel_world_size() if parallel_state.is_initialized() else 1


# --- also of a step without a pipeline ----------------------------------------------------------------------


def finalize_gradients(config: Any, models: Sequence[torch.nn.Module], num_tokens: Tensor) -> None:
    """Hands the gradients of all chunks to ``config.finalize_model_grads_func``, where there is one."""
    if config.finalize_model_grads_func is not None:
        tokens = num_tokens if averages_per_token(config) else None
        config.finalize_model_grads_func(list(models), tokens)


def averages_per_token(config: Any) -> bool:
    """Whether gradients are divided by the tokens of the whole step; a plain ModelParallelConfig says no."""
    return getattr(config, "calculate_per_token_loss", False)


def check_first_val_step(first_val_step: bool | None, forward_only: bool, cond: bool) -> bool:
    """``cond``, but in an evaluation that says so only during its first step."""
    if first_val_step is not None and forward_only:
        return first_val_step and cond
    return cond


def deallocate_output_tensor(out: Tensor | None, deallocate_pipeline_outputs: bool = False) -> None:
    """Shrinks the data of an output that has been sent to one element; its place in the graph stays.

    Args:
        out: not a view of another tensor: freeing it would free nothing.
        deallocate_pipeline_outputs: do nothing if False.
    """
    if out is None or not deallocate_pipeline_outputs:
        return
    assert_viewless_tensor(out, "a stage's output that is to be freed")
    out.data = torch.empty((1,), device=out.device, dtype=out.dtype)
