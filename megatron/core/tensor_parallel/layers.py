"""Layers whose weights are split over the tensor-parallel group: here, over one rank.

Parameters carry ``tensor_model_parallel``, ``partition_dim`` and ``partition_stride``. Linear layers return
``(output, bias or None)``; with ``skip_bias_add`` the caller adds the bias, often fused with what follows.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from megatron.core import accelerator
from megatron.core.errors import DataError, NotBuiltYetError
from megatron.core.fusions.embedding import embedding_lookup
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel.attributes import (
    copy_tensor_model_parallel_attributes,
    param_is_not_tensor_parallel_duplicate,
    set_defaults_if_not_set_tensor_model_parallel_attributes,
    set_tensor_model_parallel_attributes,
)
from megatron.core.tensor_parallel.linear import (
    LinearWithGradAccumulationAndAsyncCommunication,
    linear_with_frozen_weight,
    linear_with_grad_accumulation_and_async_allreduce,
)
from megatron.core.tensor_parallel.random import (
    get_cuda_rng_tracker,
    get_expert_parallel_rng_tracker_name,
)

__all__ = [
    "ColumnParallelLinear",
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

InitMethod = Callable[[Tensor], Any]


def _require_one_rank(config: ModelParallelConfig) -> None:
    size = config.tensor_model_parallel_size
    if size > 1:
        raise NotBuiltYetError("tensor parallelism", f"--tensor-model-parallel-size {size}", "Use 1.")


def _initialize_affine_weight_gpu(
    weight: Tensor, init_method: InitMethod, partition_dim: int, stride: int = 1, is_expert: bool = False
) -> None:
    """Marks the weight and draws it on its device, from the tensor-parallel (or expert) random stream."""
    set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=partition_dim, stride=stride)
    tracker = get_cuda_rng_tracker()
    with tracker.fork(get_expert_parallel_rng_tracker_name()) if is_expert else tracker.fork():
        init_method(weight)


def _initialize_affine_weight_cpu(
    weight: Tensor,
    output_size: int,
    input_size: int,
    per_partition_size: int,
    partition_dim: int,
    init_method: InitMethod,
    stride: int = 1,
    return_master_weight: bool = False,
    *,
    params_dtype: torch.dtype = torch.float32,
) -> Tensor | None:
    """Marks the weight and draws all of it in fp32 from the CPU generator, whatever the number of ranks."""
    set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=partition_dim, stride=stride)
    master = torch.empty(output_size, input_size, dtype=torch.float32)
    init_method(master)
    with torch.no_grad():
        weight.copy_(master.to(params_dtype))
    return master if return_master_weight else None


def _new_weight(
    config: ModelParallelConfig,
    shape: tuple[int, int],
    partition_dim: int,
    init_method: InitMethod,
    stride: int = 1,
    is_expert: bool = False,
    keep_master: bool = False,
) -> tuple[nn.Parameter, Tensor | None]:
    """A weight [out, in] made and drawn as the config says, and its fp32 master if wanted."""
    device = accelerator.build_device(config)
    weight = nn.Parameter(torch.empty(shape, dtype=config.params_dtype, device=device))
    master = None
    if not config.perform_initialization or weight.is_meta:
        set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=partition_dim, stride=stride)
    elif config.use_cpu_initialization:
        master = _initialize_affine_weight_cpu(
            weight,
            *shape,
            shape[partition_dim],
            partition_dim,
            init_method,
            stride,
            keep_master,
            params_dtype=config.params_dtype,
        )
    else:
        _initialize_affine_weight_gpu(weight, init_method, partition_dim, stride, is_expert)
    # False means: reduced over expert-data-parallel ranks only.
    weight.allreduce = not (is_expert and config.expert_model_parallel_size > 1)
    return weight, master


def _new_bias(config: ModelParallelConfig, size: int, is_split: bool, is_expert: bool) -> nn.Parameter:
    """A zero bias [size]."""
    bias = nn.Parameter(torch.zeros(size, dtype=config.params_dtype, device=accelerator.build_device(config)))
    if is_split:
        set_tensor_model_parallel_attributes(bias, is_parallel=True, dim=0, stride=1)
    bias.allreduce = not (is_expert and config.expert_model_parallel_size > 1)
    return bias


class _StatelessExtra(nn.Module):
    """Writes ``_extra_state: None`` as existing checkpoints have it; loads with any or no extra state."""

    def get_extra_state(self) -> None:
        return None

    def set_extra_state(self, state: Any) -> None:
        """Extra state (fp8 scales of other implementations) has no use here."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.setdefault(f"{prefix}_extra_state", None)
        super()._load_from_state_dict(state_dict, prefix, *args)


class _Linear(_StatelessExtra):
    """What column- and row-parallel layers share with one rank.

    Attributes:
        weight: [out, in], or None if the caller brings one.
        bias: [out] or None.
    """

    def __init__(self, config: ModelParallelConfig, sizes: tuple[int, int], skip_bias_add: bool):
        super().__init__()
        _require_one_rank(config)
        self.config = config
        self.input_size, self.output_size = sizes
        self.skip_bias_add = skip_bias_add
        self.sequence_parallel = config.sequence_parallel
        self.gradient_accumulation_fusion = config.gradient_accumulation_fusion

    def _linear(self, input_: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """[..., in] -> [..., out], and the bias if it is left to the caller."""
        added = None if self.skip_bias_add else self.bias
        function = (
            linear_with_grad_accumulation_and_async_allreduce
            if weight.requires_grad
            else linear_with_frozen_weight
        )
        out = function(input_, weight, added, self.gradient_accumulation_fusion, False, False)
        return out, self.bias if self.skip_bias_add else None

    def extra_repr(self) -> str:
        return f"in_features={self.input_size}, out_features={self.output_size}, bias={self.bias is not None}"


class ColumnParallelLinear(_Linear):
    """``y = x A^T + b`` with the rows of A (the outputs) split over the group.

    Args:
        input_size, output_size: widths of the whole layer.
        config: precision, device, tensor-parallel size.
        init_method: fills the weight.
        bias: have one.
        gather_output: give every rank the whole output.
        stride: parts of the output that are split one by one (2 for gate and up, say).
        keep_master_weight_for_test: keep the fp32 weight drawn on the CPU as ``master_weight``.
        skip_bias_add: return the bias instead of adding it.
        skip_weight_param_allocation: have no weight; pass one to ``forward``.
        embedding_activation_buffer, grad_output_buffer: for deferred weight gradients, not built yet.
        is_expert: weights of a mixture's expert.
        tp_comm_buffer_name: names a communication buffer of TransformerEngine; not needed.
        disable_grad_reduce: leave the input's gradient unreduced; with one rank there is nothing to reduce.
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
        super().__init__(config, (input_size, output_size), skip_bias_add)
        if embedding_activation_buffer is not None or grad_output_buffer is not None:
            raise NotBuiltYetError("deferring the output layer's weight gradient")
        self.gather_output = gather_output
        self.output_size_per_partition = output_size
        self.is_expert = is_expert
        self.weight = self.master_weight = None
        if not skip_weight_param_allocation:
            self.weight, self.master_weight = _new_weight(
                config,
                (output_size, input_size),
                0,
                init_method,
                stride,
                is_expert,
                keep_master_weight_for_test,
            )
        self.bias = _new_bias(config, output_size, True, is_expert) if bias else None

    def forward(
        self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """[..., in] -> [..., out], and the bias or None.

        Args:
            input_: the same on all ranks.
            weight: used instead of the layer's own; needed if it has none.
            runtime_gather_output: overrides ``gather_output``; no difference with one rank.
        """
        weight = self.weight if weight is None else weight
        assert weight is not None, "this layer was built without a weight: pass one to forward()"
        assert weight.shape == (self.output_size, self.input_size), (
            f"weight is {tuple(weight.shape)}, expected {(self.output_size, self.input_size)}"
        )
        return self._linear(input_, weight)


class RowParallelLinear(_Linear):
    """``y = x A^T + b`` with the columns of A (the inputs) split over the group.

    Args:
        input_size, output_size: widths of the whole layer.
        config: precision, device, tensor-parallel size.
        init_method: fills the weight.
        bias: have one; it is never split.
        input_is_parallel: the input is split already.
        skip_bias_add: return the bias instead of adding it.
        stride: as in :class:`ColumnParallelLinear`.
        keep_master_weight_for_test: keep the fp32 weight drawn on the CPU as ``master_weight``.
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
        super().__init__(config, (input_size, output_size), skip_bias_add)
        self.input_is_parallel = input_is_parallel
        self.input_size_per_partition = input_size
        self.is_expert = is_expert
        self.weight, self.master_weight = _new_weight(
            config, (output_size, input_size), 1, init_method, stride, is_expert, keep_master_weight_for_test
        )
        self.bias = _new_bias(config, output_size, False, is_expert) if bias else None
        if self.bias is not None:
            self.bias.sequence_parallel = self.sequence_parallel

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """[..., in] -> [..., out], and the bias or None."""
        return self._linear(input_, self.weight)


class VocabParallelEmbedding(nn.Module):
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
        _require_one_rank(config)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.reduce_scatter_embeddings = reduce_scatter_embeddings
        self.tensor_model_parallel_size = config.tensor_model_parallel_size
        self.vocab_start_index, self.vocab_end_index = 0, num_embeddings
        self.weight, _ = _new_weight(config, (num_embeddings, embedding_dim), 0, init_method)

    def forward(self, input_: Tensor) -> Tensor:
        """[b, s] -> [b, s, h], or [s, b, h] with ``reduce_scatter_embeddings``.

        Raises:
            DataError: a token id outside the vocabulary (found on a CPU only, where looking is free).
        """
        try:
            output = embedding_lookup(input_, self.weight)
        except IndexError as error:
            raise DataError(
                f"token ids run from {int(input_.min())} to {int(input_.max())}, but the embedding table has "
                f"{self.num_embeddings} rows: the data was made with another tokenizer than this model's"
            ) from error
        # [b, s, h] -> [s, b, h]
        return output.transpose(0, 1).contiguous() if self.reduce_scatter_embeddings else output
