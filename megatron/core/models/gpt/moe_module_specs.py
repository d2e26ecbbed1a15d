"""Which modules a layer's mixture of experts is made of."""

from megatron.core.errors import ConfigError
from megatron.core.extensions.transformer_engine import (
    TEColumnParallelGroupedLinear,
    TEColumnParallelLinear,
    TERowParallelGroupedLinear,
    TERowParallelLinear,
)
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import GroupedMLP, SequentialMLP, TEGroupedMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import ModuleSpec


def get_moe_module_spec(
    use_te: bool | None = True,
    num_experts: int | None = None,
    moe_grouped_gemm: bool | None = False,
    moe_use_legacy_grouped_gemm: bool | None = False,
) -> ModuleSpec:
    """A layer of experts: one after the other, or grouped.

    Args:
        use_te: parameters have TransformerEngine's names.
        num_experts: must be given; their number itself is the config's.
        moe_grouped_gemm: multiply all experts of a rank at once.
        moe_use_legacy_grouped_gemm: the two-weight layout of grouped experts also with ``use_te``.
    """
    if num_experts is None:
        raise ConfigError("num_experts: unset, but a spec of experts is asked for")
    column, row = (
        (TEColumnParallelLinear, TERowParallelLinear) if use_te else (ColumnParallelLinear, RowParallelLinear)
    )
    mlp = MLPSubmodules(linear_fc1=column, linear_fc2=row)
    if not moe_grouped_gemm:
        experts = ModuleSpec(module=SequentialMLP, submodules=mlp)
    elif use_te and not moe_use_legacy_grouped_gemm:
        grouped = MLPSubmodules(TEColumnParallelGroupedLinear, TERowParallelGroupedLinear)
        experts = ModuleSpec(module=TEGroupedMLP, submodules=grouped)
    else:
        experts = ModuleSpec(module=GroupedMLP)
    shared = ModuleSpec(module=SharedExpertMLP, params={"gate": False}, submodules=mlp)
    return ModuleSpec(module=MoELayer, submodules=MoESubmodules(experts=experts, shared_experts=shared))
