"""One micro-batch on one chunk: forward to an output or a loss, and backward from it."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Variable

from megatron.core import parallel_state
from megatron.core.errors import UsageError
from megatron.core.utils import assert_viewless_tensor, get_attr_wrapped_model

Tensors = Tensor | None | list[Tensor | None]


def timed(config: Any, name: str) -> contextlib.AbstractContextManager[None]:
    """Context measured by the level-2 timer ``name``, if there are timers."""
    return contextlib.nullcontext() if config.timers is None else _timed(config.timers(name, log_level=2))


@contextlib.contextmanager
def _timed(timer: Any) -> Iterator[None]:
    timer.start()
    yield
    timer.stop()


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


def custom_backward(output: Tensor, grad_output: Tensor | None) -> None:
    """Backward from an output whose data may have been shrunk by :func:`deallocate_output_tensor`.

    ``torch.autograd.backward`` compares the shapes of output and gradient; the engine itself looks at the
    shape the graph remembers.
    """
    if grad_output is None:
        if output.numel() != 1:
            raise UsageError(f"no gradient given for an output of {output.numel()} elements")
        grad_output = torch.ones_like(output, memory_format=torch.preserve_format)
    Variable._execution_engine.run_backward(
        tensors=(output,),
        grad_tensors=(grad_output,),
        keep_graph=False,
        create_graph=False,
        inputs=(),
        allow_unreachable=True,
        accumulate_grad=True,
    )


def _replaceable_custom_backward(output: Tensor, grad_output: Tensor | None) -> None:
    """The same, looked up under its public name at every call: scripts and tests replace it there."""
    from megatron.core.pipeline_parallel import schedules

    schedules.custom_backward(output, grad_output)


def set_current_microbatch(model: torch.nn.Module, microbatch_id: int) -> None:
    """Tells the decoder's layers the number of the micro-batch; a model without a decoder is left alone."""
    try:
        decoder = get_attr_wrapped_model(model, "decoder")
    except UsageError:
        return
    for layer in getattr(decoder, "layers", ()):
        layer.current_microbatch = microbatch_id


def check_first_val_step(first_val_step: bool | None, forward_only: bool, cond: bool) -> bool:
    """``cond``, but in an evaluation that says so only during its first step."""
    if first_val_step is not None and forward_only:
        return first_val_step and cond
    return cond


def is_last_stage() -> bool:
    """Whether the chunk being run makes the loss; True without process groups."""
    return not parallel_state.is_initialized() or parallel_state.is_pipeline_last_stage()


def forward_step(
    forward_step_func: Callable,
    data_iterator: Iterator,
    model: torch.nn.Module,
    num_microbatches: int,
    input_tensor: Tensors,
    forward_data_store: list[Any],
    config: Any,
    collect_non_loss_data: bool = False,
    checkpoint_activations_microbatch: bool | None = None,
    is_first_microbatch: bool = False,
    current_microbatch: int | None = None,
    encoder_decoder_xattn: bool = False,
) -> tuple[Any, Tensor]:
    """Run one micro-batch forward; on the last stage turn its loss into the value to differentiate.

    Args:
        forward_step_func: ``(data_iterator, model) -> (output, loss_func)``; with
            ``checkpoint_activations_microbatch`` not None it gets that as a third argument.
        input_tensor: what the previous stage sent, bare or in a list; None on the first stage.
        forward_data_store: receives the report (or the data that is not a loss) on the last stage.
        is_first_microbatch: tell the model that weights have changed since its last forward pass.
        current_microbatch: number told to the layers.
        encoder_decoder_xattn: of models with an encoder, which do not exist yet.

    Returns:
        The output, in a list if the input was one, and the number of tokens its loss counted, an int64
        scalar, 0 where the loss function does not tell.
    """
    with timed(config, "forward-compute"):
        if is_first_microbatch and hasattr(model, "set_is_first_microbatch"):
            model.set_is_first_microbatch()
        if current_microbatch is not None:
            set_current_microbatch(model, current_microbatch)
        inputs = input_tensor if isinstance(input_tensor, list) else [input_tensor]
        if inputs[0] is not None:
            get_attr_wrapped_model(model, "set_input_tensor")(inputs)
        arguments = (data_iterator, model)
        if checkpoint_activations_microbatch is not None:
            arguments += (checkpoint_activations_microbatch,)
        with _autocast(model, config):
            output, loss_func = forward_step_func(*arguments)
        num_tokens = torch.zeros((), dtype=torch.int64)
        if is_last_stage():
            if collect_non_loss_data:
                forward_data_store.append(loss_func(output, non_loss_data=True))
            else:
                output, num_tokens, report = _loss_and_report(loss_func(output), num_microbatches, config)
                forward_data_store.append(report)
    if isinstance(input_tensor, list) and not isinstance(output, list):
        output = [output]
    return output, num_tokens


def _autocast(model: torch.nn.Module, config: Any) -> contextlib.AbstractContextManager[Any]:
    """Autocast only when it is asked for: entering it costs time on every micro-batch."""
    if not config.enable_autocast:
        return contextlib.nullcontext()
    return torch.autocast(next(model.parameters()).device.type, config.autocast_dtype)


def averages_per_token(config: Any) -> bool:
    """Whether gradients are divided by the tokens of the whole step; a plain ModelParallelConfig says no."""
    return getattr(config, "calculate_per_token_loss", False)


def _loss_and_report(result: tuple, num_microbatches: int, config: Any) -> tuple[Any, Tensor, Any]:
    """Scale what a loss function returned: tensors, or in an evaluation also plain numbers.

    A pair is (loss, report): the loss is averaged over micro-batches. A triple is (sum of losses, number
    of tokens, report): the sum is divided by the tokens too, unless gradients are divided by the token
    count of the whole step at its end (``calculate_per_token_loss``). Gradients that are averaged over the
    data- and context-parallel ranks need a loss times the context-parallel size: these ranks hold parts of
    the same sequences, so their gradients add up.
    """
    if not isinstance(result, tuple | list) or len(result) not in (2, 3):
        raise UsageError(
            "a loss function returns (loss, report) or (sum of losses, number of tokens, report), not "
            f"{len(result) if isinstance(result, tuple | list) else type(result).__name__} of something else"
        )
    per_token = averages_per_token(config)
    if len(result) == 2:
        loss, report = result
        num_tokens = torch.zeros((), dtype=torch.int64)
        loss = loss / num_microbatches
    else:
        loss, counted, report = result
        num_tokens = torch.as_tensor(counted).detach()
        if not per_token:
            loss = loss / num_tokens.clamp(min=1) / num_microbatches
    if not per_token and parallel_state.is_initialized():
        parts = parallel_state.get_context_parallel_world_size()
        loss = loss if parts <= 1 else loss * parts
    return loss, num_tokens, report


def backward_step(
    input_tensor: Tensors, output_tensor: Any, output_tensor_grad: Tensors, model_type: Any, config: Any
) -> Any:
    """Run one micro-batch backward.

    Args:
        input_tensor: inputs of the forward pass, bare or in a list, None where there was none.
        output_tensor: its outputs, bare or in a list.
        output_tensor_grad: gradients of the outputs; None for the loss, which is scaled by
            ``config.grad_scale_func``.
        model_type: one kind of model exists.

    Returns:
        Gradients of the inputs, in the form of ``input_tensor``.
    """
    with timed(config, "backward-compute"):
        inputs = input_tensor if isinstance(input_tensor, list) else [input_tensor]
        for tensor in inputs:
            if tensor is not None:
                tensor.retain_grad()
        output = output_tensor[0] if isinstance(output_tensor, list) else output_tensor
        grad = output_tensor_grad[0] if isinstance(output_tensor_grad, list) else output_tensor_grad
        if grad is None and config.grad_scale_func is not None:
            output = config.grad_scale_func(output)
        # What has no graph of its own (a stage without layers) has not been shrunk.
        if config.deallocate_pipeline_outputs and getattr(output, "grad_fn", None) is not None:
            _replaceable_custom_backward(output, grad)
        else:
            torch.autograd.backward(output, grad_tensors=grad)
        grads = [None if tensor is None else tensor.grad for tensor in inputs]
    return grads if isinstance(input_tensor, list) else grads[0]
