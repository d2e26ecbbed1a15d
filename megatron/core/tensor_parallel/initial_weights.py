"""Making the parameters of split layers: the marks of how they are split, and their first values."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron.core import accelerator, parallel_state
from megatron.core.errors import ConfigError, UsageError
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel.rng_tracker import (
    RngStreamError,
    get_cuda_rng_tracker,
    get_expert_parallel_rng_tracker_name,
)
from megatron.core.tensor_parallel.weight_streams import seeded
from megatron.core.utils.tensors import mark

InitMethod = Callable[[Tensor], Any]
# name -> value of a parameter that is not split
_DEFAULTS = {"tensor_model_parallel": False, "partition_dim": -1, "partition_stride": 1}


def param_is_not_tensor_parallel_duplicate(param: Tensor) -> bool:
    """True for one copy of each element: a split parameter, or anything on tensor-parallel rank 0."""
    return (
        getattr(param, "tensor_model_parallel", False) or parallel_state.get_tensor_model_parallel_rank() == 0
    )


def set_tensor_model_parallel_attributes(tensor: Tensor, is_parallel: bool, dim: int, stride: int) -> None:
    """Marks a parameter as split along ``dim``, in ``stride`` interleaved parts; only once."""
    for name in _DEFAULTS:
        if hasattr(tensor, name):
            raise UsageError(f"parameter has {name} = {getattr(tensor, name)} already")
    mark(tensor, tensor_model_parallel=is_parallel, partition_dim=dim, partition_stride=stride)


def set_defaults_if_not_set_tensor_model_parallel_attributes(tensor: Tensor) -> None:
    """Marks a parameter as not split, where nothing is said."""
    for name, value in _DEFAULTS.items():
        if not hasattr(tensor, name):
            setattr(tensor, name, value)


def copy_tensor_model_parallel_attributes(destination_tensor: Tensor, source_tensor: Tensor) -> None:
    """Copies the attributes that ``source_tensor`` has."""
    for name in _DEFAULTS:
        if hasattr(source_tensor, name):
            setattr(destination_tensor, name, getattr(source_tensor, name))


@dataclass(frozen=True)
class Place:
    """This process's place among the ranks that share a layer's weights.

    Attributes:
        rank, size: in the tensor-parallel group, or for experts in theirs.
        is_expert: which of the two.
    """

    rank: int
    size: int
    is_expert: bool = False

    @classmethod
    def find(cls, config: ModelParallelConfig, is_expert: bool = False) -> "Place":
        """The place by the process groups; without any, there is one rank.

        Raises:
            ConfigError: the config counts other ranks than there are.
        """
        if is_expert:
            wanted, flag = config.expert_tensor_parallel_size, "expert_tensor_parallel_size"
            get_size = parallel_state.get_expert_tensor_parallel_world_size
            get_rank = parallel_state.get_expert_tensor_parallel_rank
        else:
            wanted, flag = config.tensor_model_parallel_size, "tensor_model_parallel_size"
            get_size = parallel_state.get_tensor_model_parallel_world_size
            get_rank = parallel_state.get_tensor_model_parallel_rank
        assert wanted is not None, "the config fills it in"
        size = _or_none(get_size)
        if (size or 1) != wanted and wanted > 1:
            found = "no process groups exist" if size is None else f"the group has {size} ranks"
            raise ConfigError(
                f"{flag}: the config says {wanted}, but {found}; call "
                f"parallel_state.initialize_model_parallel({flag}={wanted}) first"
            )
        return cls(0, 1, is_expert) if size is None else cls(get_rank() if size > 1 else 0, size, is_expert)

    def group(self) -> ProcessGroup | None:
        """The group itself, looked up when it is used: modules can then be copied and pickled."""
        if self.size == 1:
            return None
        if self.is_expert:
            return parallel_state.get_expert_tensor_parallel_group()
        return parallel_state.get_tensor_model_parallel_group()

    def divide(self, total: int, what: str) -> int:
        """This rank's share of ``total``.

        Raises:
            ConfigError: it does not divide.
        """
        if total % self.size:
            raise ConfigError(
                f"{what} {total} does not divide by tensor-parallel size {self.size}: use a multiple of it"
            )
        return total // self.size


def _or_none(get: Callable[[], int]) -> int | None:
    try:
        return get()
    except AssertionError:  # no groups, and no size set by hand
        return None


def has_own_replicas(config: ModelParallelConfig, is_expert: bool) -> bool:
    """Whether other ranks hold a weight's copies than hold those of dense layers.

    So it is for experts that are spread over ranks, or split over others than dense layers are.
    """
    spread = config.expert_model_parallel_size > 1
    return is_expert and (spread or config.expert_tensor_parallel_size != config.tensor_model_parallel_size)


def own_slice(whole: Tensor, dim: int, stride: int, rank: int, size: int) -> Tensor:
    """What ``rank`` holds of ``whole``: its slice of each of the ``stride`` equal parts along ``dim``."""
    if size == 1:
        return whole
    pieces = whole.chunk(stride * size, dim)
    return torch.cat(pieces[rank::size], dim)


def new_weight(
    config: ModelParallelConfig,
    whole_shape: tuple[int, int],
    split_dim: int | None,
    init_method: InitMethod,
    place: Place,
    stride: int = 1,
    keep_master: bool = False,
) -> tuple[nn.Parameter, Tensor | None]:
    """This rank's part of a weight [out, in], drawn as the config says, and the whole in fp32 if wanted.

    Args:
        config: precision, device, whether to draw.
        whole_shape: of all ranks' parts together.
        split_dim: which dimension is split; None leaves the weight whole.
        init_method: fills the whole weight.
        place: of this rank.
        stride: parts that are split one by one.
        keep_master: keep the whole weight, where it is drawn on the CPU.
    """
    shape = list(whole_shape)
    if split_dim is not None:
        shape[split_dim] = place.divide(shape[split_dim] // stride, "a layer of width") * stride
    device = accelerator.build_device(config)
    weight = nn.Parameter(torch.empty(shape, dtype=config.params_dtype, device=device))
    if split_dim is not None:
        set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=split_dim, stride=stride)
    master = None
    if config.perform_initialization and not weight.is_meta:
        whole = _draw(config, weight, whole_shape, init_method)
        master = whole if keep_master and config.use_cpu_initialization else None
        if whole.data_ptr() != weight.data_ptr():
            size = 1 if split_dim is None else place.size
            with torch.no_grad():
                weight.copy_(own_slice(whole, split_dim or 0, stride, place.rank, size))
    mark(weight, allreduce=not has_own_replicas(config, place.is_expert))
    return weight, master


def _draw(
    config: ModelParallelConfig, weight: nn.Parameter, whole_shape: tuple[int, int], init_method: InitMethod
) -> Tensor:
    """The whole weight, from its own stream; in the memory of ``weight`` where that is the whole."""
    dtype = torch.float32 if config.use_cpu_initialization else weight.dtype
    is_itself = weight.shape == torch.Size(whole_shape) and dtype == weight.dtype
    # Detached, because initialisers of users' own write without asking autograd.
    whole = weight.detach() if is_itself else torch.empty(whole_shape, dtype=dtype, device=weight.device)
    streams = get_cuda_rng_tracker().weight_streams
    if streams is not None:
        with seeded(streams.next_seed(), weight.device):
            init_method(whole)
    elif config.use_cpu_initialization:
        init_method(whole)
    else:
        raise RngStreamError(
            "weights have no random stream: call model_parallel_cuda_manual_seed(seed) first"
        )
    return whole


def new_bias(
    config: ModelParallelConfig, size: int, is_split: bool, place: Place, stride: int = 1
) -> nn.Parameter:
    """This rank's part of a zero bias of ``size`` elements."""
    length = place.divide(size, "a bias of length") if is_split else size
    bias = nn.Parameter(
        torch.zeros(length, dtype=config.params_dtype, device=accelerator.build_device(config))
    )
    if is_split:
        set_tensor_model_parallel_attributes(bias, is_parallel=True, dim=0, stride=stride)
    # False means: reduced over expert-data-parallel ranks only.
    mark(bias, allreduce=not has_own_replicas(config, place.is_expert))
    return bias


def _initialize_affine_weight_gpu(
    weight: Tensor, init_method: InitMethod, partition_dim: int, stride: int = 1, is_expert: bool = False
) -> None:
    """For code with its own layers: draws this rank's part from its model- (or expert-) parallel stream.

    Such a weight depends on the number of ranks; :func:`new_weight` makes those that do not.
    """
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
    rank: int | None = None,
    world_size: int | None = None,
) -> Tensor | None:
    """For code with its own layers: draws all of the weight in fp32 from the CPU generator, and cuts it.

    ``rank`` and ``world_size`` default to this process's tensor-parallel ones. Returns the whole if asked.
    """
    set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=partition_dim, stride=stride)
    size = _or_none(parallel_state.get_tensor_model_parallel_world_size) if world_size is None else world_size
    place = _or_none(parallel_state.get_tensor_model_parallel_rank) if rank is None else rank
    master = torch.empty(output_size, input_size, dtype=torch.float32)
    init_method(master)
    mine = own_slice(master, partition_dim, stride, place or 0, size or 1)
    assert mine.shape[partition_dim] == per_partition_size, (
        f"a part of {per_partition_size} asked for, but {size} ranks have {mine.shape[partition_dim]} each"
    )
    with torch.no_grad():
        weight.copy_(mine.to(params_dtype))
    return master if return_master_weight else None
