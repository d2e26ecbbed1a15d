"""Linear layers and the embedding whose weights are split over the tensor-parallel group.

Parameters carry ``tensor_model_parallel``, ``partition_dim`` and ``partition_stride``. Linear layers return
``(output, bias or None)``; with ``skip_bias_add`` the caller adds the bias, often fused with what follows.
Shapes below are those of one rank: TP is the number of ranks, and under sequence parallelism activations
outside these layers hold s/TP positions.
"""

from typing import Any

from torch import Tensor, nn

from megatron.core import accelerator
from megatron.core.collectives import (  # noqa: F401  (also importable from here)
    dist_all_gather_func,
    dist_reduce_scatter_func,
)
from megatron.core.errors import DataError, UsageError
from megatron.core.fusions.embeddings import embedding_lookup
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel.initial_weights import (
    InitMethod,
    Place,
    _initialize_affine_weight_cpu,  # noqa: F401  (called by code that makes its own layers)
    _initialize_affine_weight_gpu,  # noqa: F401
    copy_tensor_model_parallel_attributes,
    new_bias,
    new_weight,
    param_is_not_tensor_parallel_duplicate,
    set_defaults_if_not_set_tensor_model_parallel_attributes,
    set_tensor_model_parallel_attributes,
)
from megatron.core.tensor_parallel.linear import (
    LinearThenSum,
    LinearWithFrozenWeight,
    LinearWithGradAccumulationAndAsyncCommunication,
    linear_with_frozen_weight,
    linear_with_grad_accumulation_and_async_allreduce,
)
from megatron.core.tensor_parallel.mappings import (
    gather_from_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    scatter_to_tensor_model_parallel_region,
)
from megatron.core.tensor_parallel.overlap import overlap_of
from megatron.core.tensor_parallel.utils import VocabUtility
from megatron.core.utils.tensors import mark
from megatron.unbuilt.placeholders import WithoutShardedState

__all__ = [
    "ColumnParallelLinear",
    "InitMethod",
    "LinearWithFrozenWeight",
    "LinearWithGradAccumulationAndAsyncCommunication",
    "RowParallelLinear",
    "VocabParallelEmbedding",
    "copy_tensor_model_parallel_attributes",
    "linear_with_frozen_weight",
    "linear_with_grad_accumulation_and_async_allreduce",
    "param_is_not_tensor_parallel_duplicate",
    "set_defaults_if_not_set_tensor_model_parallel_attributes",
    "set_tensor_model_parallel_attributes",
]

# Adding weight gradients straight into main_grad needs no extension here.
_grad_accum_fusion_available = True


class _StatelessExtra(WithoutShardedState, nn.Module):
    """Writes ``_extra_state: None`` as existing checkpoints have it; loads with any or no extra state."""

    def get_extra_state(self) -> None:
        return None

    def set_extra_state(self, state: Any) -> None:
        """Extra state (fp8 scales of other implementations) has no use here."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.setdefault(f"{prefix}_extra_state", None)
        super()._load_from_state_dict(state_dict, prefix, *args)


class LinearBase(_StatelessExtra):
    """What linear layers share, however their weight is split.

    Experts whose tokens a dispatcher brings (``explicit_expert_comm``) leave all communication to it.

    Attributes:
        weight: this rank's part of [out, in], or None if the caller brings one.
        bias: [out/TP] or [out], or None.
        place: of this rank among those that share the weight.
        sequence_parallel: activations outside hold this rank's part of the sequence.
        overlap: how matmuls overlap with the layer's traffic; None if they do not.
    """

    bias: nn.Parameter | None

    def __init__(
        self, config: ModelParallelConfig, sizes: tuple[int, int], skip_bias_add: bool, is_expert: bool
    ):
        super().__init__()
        self.config = config
        self.input_size, self.output_size = sizes
        self.skip_bias_add = skip_bias_add
        self.is_expert = is_expert
        self.place = Place.find(config, is_expert)
        self.explicit_expert_comm = is_expert and (
            config.sequence_parallel or config.expert_model_parallel_size > 1
        )
        many = self.place.size > 1
        self.communicates = many and not self.explicit_expert_comm
        self.sequence_parallel = many and config.sequence_parallel
        self.gradient_accumulation_fusion = config.gradient_accumulation_fusion
        self.overlap = overlap_of(config) if self.communicates else None

    def leave_communication_to_caller(self) -> None:
        """From now on inputs come as the weight needs them, and outputs leave as partial results."""
        self.explicit_expert_comm, self.communicates, self.overlap = True, False, None

    def _linear(
        self, input_: Tensor, weight: Tensor, bias: Tensor | None, reduce_input_gradient: bool, **buffers: Any
    ) -> Tensor:
        """[..., in] -> [..., out] of the part held here.

        ``reduce_input_gradient``: all ranks have the same input (or a part of it each, under sequence
        parallelism), and the gradients that they find for it belong together.
        """
        function = linear_with_grad_accumulation_and_async_allreduce
        if self.overlap is not None and reduce_input_gradient:
            buffers["overlap"] = self.overlap
        elif not weight.requires_grad:
            function = linear_with_frozen_weight
        gathers = self.sequence_parallel and reduce_input_gradient
        return function(
            input_,
            weight,
            bias,
            self.gradient_accumulation_fusion,
            reduce_input_gradient and not gathers,
            gathers,
            group=self.place.group(),
            **buffers,
        )

    def _linear_then_sum(self, input_: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """Own part of the input times own columns of the weight, summed over ranks; then the bias, once."""
        if not self.communicates:
            added = None if self.skip_bias_add else self.bias
            return self._linear(input_, weight, added, False), self.bias if self.skip_bias_add else None
        out = self._summed_matmul(input_, weight)
        if self.skip_bias_add:
            return out, self.bias
        return out if self.bias is None else out + self.bias, None

    def _summed_matmul(self, input_: Tensor, weight: Tensor) -> Tensor:
        """[s, b, in/TP] -> [s, b, out], or [s/TP, b, out] under sequence parallelism."""
        group = self.place.group()
        if self.overlap is not None:
            fusion = self.gradient_accumulation_fusion
            return LinearThenSum.apply(input_, weight, fusion, self.sequence_parallel, group, self.overlap)
        partial = self._linear(input_, weight, None, False)
        if self.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(partial, group)
        return reduce_from_tensor_model_parallel_region(partial, group)

    def extra_repr(self) -> str:
        ranks = f", ranks={self.place.size}" if self.place.size > 1 else ""
        return (
            f"in_features={self.input_size}, out_features={self.output_size}, "
            f"bias={self.bias is not None}{ranks}"
        )


class ColumnParallelLinear(LinearBase):
    """``y = x A^T + b`` with the rows of A (the outputs) split over the group.

    Args:
        input_size, output_size: widths of the whole layer.
        config: precision, device, tensor-parallel size.
        init_method: fills the weight.
        bias: have one.
        gather_output: give every rank the whole output.
        stride: parts of the output that are split one by one (2 for gate and up, say).
        keep_master_weight_for_test: keep the whole fp32 weight drawn on the CPU as ``master_weight``.
        skip_bias_add: return the bias instead of adding it.
        skip_weight_param_allocation: have no weight; pass one to ``forward``.
        embedding_activation_buffer, grad_output_buffer: lists that take inputs and output gradients, from
            which the caller computes the weight's gradient later (``config.defer_embedding_wgrad_compute``).
        is_expert: weights of a mixture's expert.
        tp_comm_buffer_name: names a communication buffer of TransformerEngine; not needed.
        disable_grad_reduce: leave the input's gradient unreduced; the caller sums it over the ranks.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: ModelParallelConfig,
        init_method: InitMethod,
        bias: bool = True,
        gather_output: bool = False,
        stride: int = 1,
        keep_master_weight_for_test: bool = False,
        skip_bias_add: bool = False,
        skip_weight_param_allocation: bool = False,
        embedding_activation_buffer: list[Tensor] | None = None,
        grad_output_buffer: list[Tensor] | None = None,
        is_expert: bool = False,
        tp_comm_buffer_name: str | None = None,
        disable_grad_reduce: bool = False,
    ):
        super().__init__(config, (input_size, output_size), skip_bias_add, is_expert)
        self.gather_output, self.stride = gather_output, stride
        self.output_size_per_partition = self.place.divide(output_size, "output_size")
        self.disable_grad_reduce = disable_grad_reduce
        self.embedding_activation_buffer = embedding_activation_buffer
        self.grad_output_buffer = grad_output_buffer
        self.weight = self.master_weight = None
        if not skip_weight_param_allocation:
            self.weight, self.master_weight = new_weight(
                config,
                (output_size, input_size),
                0,
                init_method,
                self.place,
                stride,
                keep_master_weight_for_test,
            )
        self.bias = new_bias(config, output_size, True, self.place, stride) if bias else None

    def forward(
        self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """[..., in] -> [..., out/TP], and the bias or None.

        Args:
            input_: the same on all ranks, or this rank's part of the sequence under sequence parallelism.
            weight: used instead of the layer's own; needed if it has none.
            runtime_gather_output: overrides ``gather_output``: the output is then [..., out].
        """
        weight = self.weight if weight is None else weight
        if weight is None:
            raise UsageError("this layer was built without a weight: pass one to forward()")
        expected = (self.output_size_per_partition, self.input_size)
        if weight.shape != expected:
            raise UsageError(f"weight is {tuple(weight.shape)}, expected {expected}")
        buffers: dict[str, Any] = {}
        inputs = self.embedding_activation_buffer
        if self.config.defer_embedding_wgrad_compute and self.grad_output_buffer is not None:
            assert inputs is not None, "the two buffers are given together"
            limit = self.config.wgrad_deferral_limit
            if not limit or len(inputs) < limit:
                inputs.append(input_)
            buffers = {"grad_output_buffer": self.grad_output_buffer, "wgrad_deferral_limit": limit}
        reduces = self.communicates and (self.sequence_parallel or not self.disable_grad_reduce)
        out = self._linear(input_, weight, None if self.skip_bias_add else self.bias, reduces, **buffers)
        gather = self.gather_output if runtime_gather_output is None else runtime_gather_output
        if gather and self.place.size > 1:
            # [..., out/TP] -> [..., out]
            out = gather_from_tensor_model_parallel_region(out, self.place.group())
            out = _swap_blocks(out, self.place.size, self.stride)
        return out, self.bias if self.skip_bias_add else None


class RowParallelLinear(LinearBase):
    """``y = x A^T + b`` with the columns of A (the inputs) split over the group.

    Args:
        input_size, output_size: widths of the whole layer.
        config: precision, device, tensor-parallel size.
        init_method: fills the weight.
        bias: have one; it is never split.
        input_is_parallel: the input is split already.
        skip_bias_add: return the bias instead of adding it.
        stride: as in :class:`ColumnParallelLinear`.
        keep_master_weight_for_test: keep the whole fp32 weight drawn on the CPU as ``master_weight``.
        is_expert: weights of a mixture's expert.
        tp_comm_buffer_name: names a communication buffer of TransformerEngine; not needed.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: ModelParallelConfig,
        init_method: InitMethod,
        bias: bool,
        input_is_parallel: bool,
        skip_bias_add: bool,
        stride: int = 1,
        keep_master_weight_for_test: bool = False,
        is_expert: bool = False,
        tp_comm_buffer_name: str | None = None,
    ):
        super().__init__(config, (input_size, output_size), skip_bias_add, is_expert)
        if config.sequence_parallel and not input_is_parallel:
            raise UsageError(
                "sequence_parallel: a row-parallel layer then takes this rank's channels of the whole "
                "sequence; set input_is_parallel=True"
            )
        self.input_is_parallel, self.stride = input_is_parallel, stride
        self.input_size_per_partition = self.place.divide(input_size, "input_size")
        self.weight, self.master_weight = new_weight(
            config, (output_size, input_size), 1, init_method, self.place, stride, keep_master_weight_for_test
        )
        self.bias = new_bias(config, output_size, False, self.place) if bias else None
        if self.bias is not None:
            # Added to a part of the sequence on every rank, its gradient must be summed over them.
            mark(self.bias, sequence_parallel=self.sequence_parallel)

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """[..., in/TP] (or [..., in]) -> [..., out], and the bias or None.

        The output is whole on all ranks, or this rank's part of the sequence under sequence parallelism.
        """
        if not self.input_is_parallel and self.place.size > 1:
            # [..., in] -> [..., in/TP]
            input_ = _swap_blocks(input_, self.stride, self.place.size)
            input_ = scatter_to_tensor_model_parallel_region(input_, self.place.group())
        return self._linear_then_sum(input_, self.weight)


def _swap_blocks(x: Tensor, rows: int, columns: int) -> Tensor:
    """Channels numbered row by row in a table of equal blocks, put into the order column by column.

    Joined parts of ranks are a table of ranks x stride blocks; the whole counts the stride's parts first.
    """
    if rows == 1 or columns == 1:
        return x
    return x.unflatten(-1, (rows, columns, -1)).transpose(-3, -2).flatten(-3)


class VocabParallelEmbedding(WithoutShardedState, nn.Module):
    """Embedding table [V, h] with its rows split over the group.

    Args:
        num_embeddings, embedding_dim: V and h.
        init_method: fills the table.
        reduce_scatter_embeddings: return [s, b, h], split along s under sequence parallelism.
        config: precision, device, tensor-parallel size.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        init_method: InitMethod,
        reduce_scatter_embeddings: bool = False,
        config: ModelParallelConfig,
    ):
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.reduce_scatter_embeddings = reduce_scatter_embeddings
        place = Place.find(config)
        self.tensor_model_parallel_size = place.size
        self.num_embeddings_per_partition = place.divide(num_embeddings, "num_embeddings")
        self.vocab_start_index, self.vocab_end_index = VocabUtility.vocab_range_from_global_vocab_size(
            num_embeddings, place.rank, place.size
        )
        self.weight, _ = new_weight(config, (num_embeddings, embedding_dim), 0, init_method, place)
        self._place = place

    def forward(self, input_: Tensor) -> Tensor:
        """[b, s] -> [b, s, h], or [s/TP, b, h] with ``reduce_scatter_embeddings``.

        Raises:
            DataError: a token id outside the vocabulary (found on a CPU only, where looking is free).
        """
        group = self._place.group()
        output = self._lookup(input_) if group is None else self._lookup_part(input_)
        if not self.reduce_scatter_embeddings:
            return reduce_from_tensor_model_parallel_region(output, group)
        # [b, s, h] -> [s, b, h] -> [s/TP, b, h]
        return reduce_scatter_to_sequence_parallel_region(output.transpose(0, 1).contiguous(), group)

    def _lookup(self, ids: Tensor) -> Tensor:
        """[b, s] -> [b, s, h]"""
        try:
            return embedding_lookup(ids, self.weight)
        except IndexError as error:
            raise self._foreign_ids(ids) from error

    def _lookup_part(self, ids: Tensor) -> Tensor:
        """[b, s] -> [b, s, h], zero where another rank has the row."""
        if (
            ids.device.type == accelerator.CPU
            and ids.numel()
            and not 0 <= ids.min() <= ids.max() < self.num_embeddings
        ):
            raise self._foreign_ids(ids)
        elsewhere = (ids < self.vocab_start_index) | (ids >= self.vocab_end_index)
        local = (ids - self.vocab_start_index).masked_fill(elsewhere, 0)
        return embedding_lookup(local, self.weight).masked_fill(elsewhere.unsqueeze(-1), 0.0)

    def _foreign_ids(self, ids: Tensor) -> DataError:
        return DataError(
            f"token ids run from {int(ids.min())} to {int(ids.max())}, but the embedding table has "
            f"{self.num_embeddings} rows: the data was made with another tokenizer than this model's"
        )
