"""Checkpoints of a training run: the public names.

User code and its tests replace ``get_args``, ``update_num_microbatches`` and ``check_checkpoint_args`` in
this module; ``run_context`` looks them up here at every call.
"""

from megatron import unbuilt
from megatron.core.num_microbatches_calculator import update_num_microbatches
from megatron.training.checkpointing.durable import check_save_directory
from megatron.training.checkpointing.layout import (
    _NON_PERSISTENT_CKPT_SUBDIR,
    _get_checkpoint_format,
    checkpoint_exists,
    ensure_directory_exists,
    find_checkpoint_rank_0,
    get_checkpoint_name,
    get_checkpoint_tracker_filename,
    get_distributed_optimizer_checkpoint_name,
    read_metadata,
)
from megatron.training.checkpointing.load import load_checkpoint
from megatron.training.checkpointing.locate import CheckpointType, _load_base_checkpoint
from megatron.training.checkpointing.model_args import check_checkpoint_args, load_args_from_checkpoint
from megatron.training.checkpointing.parameter_names import fix_query_key_value_ordering
from megatron.training.checkpointing.publishing import cleanup_old_non_persistent_checkpoint
from megatron.training.checkpointing.run_context import get_checkpoint_version, set_checkpoint_version
from megatron.training.checkpointing.save import maybe_save_dataloader_state, save_checkpoint
from megatron.training.checkpointing.state import generate_state_dict, get_rng_state
from megatron.training.global_vars import get_args

__getattr__ = unbuilt.names_of(__name__)
