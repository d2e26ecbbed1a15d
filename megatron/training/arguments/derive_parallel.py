"""How the world divides into groups, and what follows from it.  Steps as in ``derive``."""

import os
from argparse import Namespace
from collections.abc import Collection

CLAMP = "MEGATRON_CLAMP_PARALLEL"
# Words of --cp-comm-type by those of --context-parallel-algo.
EXCHANGES = {"ulysses_cp_algo": "a2a", "megatron_cp_algo": "p2p", "hybrid_cp_algo": "a2a+p2p"}


def clamp_sizes(args: Namespace, given: Collection[str]) -> list[str]:
    """With MEGATRON_CLAMP_PARALLEL=1, sizes larger than the world shrink to it, as they did in 2023."""
    if os.environ.get(CLAMP) != "1":
        return []
    notes = []
    world = args.world_size
    for name, limit in (
        ("tensor", lambda: world),
        ("pipeline", lambda: world // args.tensor_model_parallel_size),
    ):
        dest = f"{name}_model_parallel_size"
        asked = getattr(args, dest)
        if asked > max(1, limit()):
            setattr(args, dest, max(1, limit()))
            notes.append(
                f"WARNING: {CLAMP}=1: --{dest.replace('_', '-')} {asked} is reduced to "
                f"{getattr(args, dest)}, because the world has {world} ranks"
            )
    return notes


def context_scheme(args: Namespace, given: Collection[str]) -> list[str]:
    """The older names of the context-parallel exchange, and of its two levels."""
    if args.context_parallel_algo in EXCHANGES and "--cp-comm-type" not in given:
        args.cp_comm_type = [EXCHANGES[args.context_parallel_algo]]
    inner, size = args.ulysses_degree_in_cp, args.context_parallel_size
    if inner and inner > 0 and size % inner == 0 and not args.hierarchical_context_parallel_sizes:
        args.hierarchical_context_parallel_sizes = [inner, size // inner]
    return []


def virtual_stages(args: Namespace, given: Collection[str]) -> list[str]:
    """Virtual stages per pipeline rank, given as such or as layers per virtual stage."""
    stages, layers_each = (
        args.num_virtual_stages_per_pipeline_rank,
        args.num_layers_per_virtual_pipeline_stage,
    )
    layers = args.num_layers or args.encoder_num_layers
    size = None
    if stages:
        size = stages
    elif layers_each and layers_each > 0 and layers and args.pipeline_model_parallel_size > 0:
        slots = (
            layers + args.account_for_embedding_in_pipeline_split + args.account_for_loss_in_pipeline_split
        )
        size = max(1, slots // args.pipeline_model_parallel_size // layers_each)
    args.virtual_pipeline_model_parallel_size = size
    if size is not None:
        return [f"Number of virtual stages per pipeline stage: {size}"]
    args.overlap_p2p_comm = False
    args.align_param_gather = False
    return []


def parallel_layout(args: Namespace, given: Collection[str]) -> list[str]:
    """Sizes of the groups, and what a single tensor rank switches off."""
    tp, pp, cp = (
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
        args.context_parallel_size,
    )
    args.transformer_pipeline_model_parallel_size = pp
    args.data_parallel_size = max(1, args.world_size // max(1, tp * pp * cp))
    if args.expert_tensor_parallel_size is None:
        args.expert_tensor_parallel_size = tp
    args.variable_seq_lengths = False
    notes = [
        f"using world size: {args.world_size}, data-parallel size: {args.data_parallel_size}, "
        f"context-parallel size: {cp}, "
        f"hierarchical context-parallel sizes: {args.hierarchical_context_parallel_sizes}"
        f"tensor-model-parallel size: {tp}, "
        f"encoder-tensor-model-parallel size: {args.encoder_tensor_model_parallel_size}, "
        f"pipeline-model-parallel size: {pp}, "
        f"encoder-pipeline-model-parallel size: {args.encoder_pipeline_model_parallel_size}"
    ]
    if tp == 1 and args.sequence_parallel:
        args.sequence_parallel = False
        notes.append("WARNING: --sequence-parallel is switched off: the tensor parallel size is 1")
    return notes


STEPS = (clamp_sizes, context_scheme, virtual_stages, parallel_layout)
