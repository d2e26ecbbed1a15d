"""Recomputation of activations in backward, with the random numbers of the first run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron.core import collectives
from megatron.core.errors import UsageError
from megatron.core.tensor_parallel.rng_tracker import RngSnapshot
from megatron.core.tensor_parallel.utils import gather_split_1d_tensor, split_tensor_into_1d_equal_chunks


@dataclass(frozen=True)
class _Share:
    """One tensor-parallel rank's piece of a tensor that all of them hold whole.

    Attributes:
        piece: [numel/TP].
        shape: of the whole.
        requires_grad: of the whole.
    """

    piece: Tensor
    shape: torch.Size
    requires_grad: bool

    @classmethod
    def of(cls, whole: Tensor) -> _Share:
        ranks = collectives.group_size(collectives.tensor_group())
        if whole.numel() % ranks:
            raise UsageError(
                f"distribute_saved_activations: an activation of shape {tuple(whole.shape)} does not divide "
                f"among {ranks} tensor-parallel ranks; leave it off"
            )
        piece = split_tensor_into_1d_equal_chunks(whole.detach().contiguous(), new_buffer=True)
        return cls(piece, whole.shape, whole.requires_grad)

    def whole(self) -> Tensor:
        return gather_split_1d_tensor(self.piece).view(self.shape).requires_grad_(self.requires_grad)


class _SavedCall:
    """A function and its arguments, kept for a second run.

    With ``distribute_first`` only this tensor-parallel rank's piece of the first argument is kept.
    """

    def __init__(
        self, ctx: Any, function: Callable[..., Any], args: tuple[Any, ...], distribute_first: bool = False
    ):
        self.function = function
        self.rng = RngSnapshot.take()
        if distribute_first and collectives.group_size(collectives.tensor_group()) > 1:
            args = (_Share.of(args[0]), *args[1:])
        self.is_tensor = [isinstance(arg, Tensor) for arg in args]
        self.others = [arg for arg in args if not isinstance(arg, Tensor)]
        ctx.save_for_backward(*(arg for arg in args if isinstance(arg, Tensor)))

    def arguments(self, ctx: Any) -> list[Any]:
        """The arguments again, tensors cut from the graph they came from."""
        tensors, others = iter(ctx.saved_tensors), iter(self.others)
        args = [
            (tensor := next(tensors)).detach().requires_grad_(tensor.requires_grad)
            if is_tensor
            else next(others)
            for is_tensor in self.is_tensor
        ]
        return [arg.whole() if isinstance(arg, _Share) else arg for arg in args]

    def run_again(self, args: list[Any]) -> Any:
        with self.rng.replay(), torch.enable_grad():
            return self.function(*args)


def _backward_through(outputs: Any, grads: tuple[Tensor | None, ...], args: list[Any]) -> list[Tensor | None]:
    """Gradients of a recomputed call's tensor arguments; its parameters accumulate theirs on the way."""
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    pairs = [
        (output, grad)
        for output, grad in zip(outputs, grads, strict=True)
        if isinstance(output, Tensor) and output.requires_grad and grad is not None
    ]
    torch.autograd.backward([output for output, _ in pairs], [grad for _, grad in pairs])
    return [arg.grad if isinstance(arg, Tensor) else None for arg in args]


def _check_plain_backward() -> None:
    if not torch.autograd._is_checkpoint_valid():
        raise UsageError("recomputation works with loss.backward(), not with torch.autograd.grad()")


class CheckpointFunction(torch.autograd.Function):
    """Autograd node of :func:`checkpoint`."""

    @staticmethod
    def forward(
        ctx: Any, run_function: Callable[..., Any], distribute_saved_activations: bool, *args: Any
    ) -> Any:
        ctx.call = _SavedCall(ctx, run_function, args, distribute_saved_activations)
        with torch.no_grad():
            return run_function(*args)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        _check_plain_backward()
        args = ctx.call.arguments(ctx)
        outputs = ctx.call.run_again(args)
        return (None, None, *_backward_through(outputs, grads, args))


def checkpoint(function: Callable[..., Any], distribute_saved_activations: bool, *args: Any) -> Any:
    """``function(*args)`` that keeps only ``args`` and runs again in backward with the same random numbers.

    Args:
        function: returns a tensor or a tuple of tensors.
        distribute_saved_activations: keep only this rank's 1/TP of the first argument, which all
            tensor-parallel ranks hold alike, and gather it in backward.
    """
    return CheckpointFunction.apply(function, distribute_saved_activations, *args)


class CheckpointWithoutOutputFunction(torch.autograd.Function):
    """Autograd node of :class:`CheckpointWithoutOutput`."""

    @staticmethod
    def forward(
        ctx: Any,
        run_function: Callable[..., Any],
        checkpoint_without_output_obj: CheckpointWithoutOutput,
        *args: Any,
    ) -> Any:
        ctx.call = _SavedCall(ctx, run_function, args)
        ctx.owner = checkpoint_without_output_obj
        checkpoint_without_output_obj.ctx = ctx
        with torch.no_grad():
            return run_function(*args)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        _check_plain_backward()
        args, outputs = ctx.owner.take_recomputed()
        return (None, None, *_backward_through(outputs, grads, args))


class CheckpointWithoutOutput:
    """Recomputation whose output is freed as well, once its consumers have run.

    Meant for cheap operations in front of an expensive one that saves its input (a norm before a linear
    layer)::

        recompute = CheckpointWithoutOutput()
        normed = recompute.checkpoint(norm, x)
        out = linear(normed)
        recompute.discard_output_and_register_recompute(out)

    When the gradient of ``out`` arrives, ``normed`` is computed again into its old place, where ``linear``
    finds it.
    """

    def __init__(self) -> None:
        self.ctx: Any = None
        self.outputs: tuple[Tensor, ...] = ()
        self._recomputed: tuple[list[Any], Any] | None = None

    def checkpoint(self, run_function: Callable[..., Any], *args: Any) -> Any:
        """Runs the function and remembers how to run it again."""
        outputs = CheckpointWithoutOutputFunction.apply(run_function, self, *args)
        self.outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        return outputs

    def discard_output_and_register_recompute(self, hook_tensor: Tensor) -> None:
        """Frees the outputs; they come back when the gradient of ``hook_tensor`` does.

        ``hook_tensor`` must be computed from the outputs, and last of all their consumers. Nothing is freed
        when it needs no gradient: no backward will come.
        """
        if not hook_tensor.requires_grad:
            return
        self._bytes = [output.untyped_storage().nbytes() for output in self.outputs]
        for output in self.outputs:
            output.untyped_storage().resize_(0)
        hook_tensor.register_hook(self._refill)

    def _refill(self, _: Tensor) -> None:
        args = self.ctx.call.arguments(self.ctx)
        results = self.ctx.call.run_again(args)
        fresh = (results,) if isinstance(results, Tensor) else results
        for output, result, size_bytes in zip(self.outputs, fresh, self._bytes, strict=True):
            # Through the storage, so that autograd does not see its saved tensor change.
            output.untyped_storage().resize_(size_bytes)
            output.untyped_storage().copy_(result.detach().contiguous().untyped_storage())
        self._recomputed = (args, results)
        self.outputs = ()

    def take_recomputed(self) -> tuple[list[Any], Any]:
        """Arguments and outputs of the second run, which happens now if no hook has asked for it."""
        if self._recomputed is None:
            args = self.ctx.call.arguments(self.ctx)
            self._recomputed = (args, self.ctx.call.run_again(args))
        recomputed, self._recomputed, self.ctx = self._recomputed, None, None
        return recomputed
