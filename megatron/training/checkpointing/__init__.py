"""Checkpoints of a training run. The public names are here; each file beside this one holds one idea.

User code and its tests replace ``get_args``, ``update_num_microbatches`` and ``check_checkpoint_args`` in
this module, so the functions that need them ask for them here, at the time of the call.
"""

from megatron import unbuilt
from megatron.core.num_microbatches_calculator import update_num_microbatches
from megatron.training.checkpointing.durable import check_save_directory
from megatron.training.checkpointing.layout import (
    _NON_PERSISTENT_CKPT_SUBDIR,
    _get_checkpoint_format,
    ensure_directory_exists,
    find_checkpoint_rank_0,
    get_checkpoint_name,
    get_distributed_optimizer_checkpoint_name,
)
from megatron.training.checkpointing.load import load_checkpoint
from megatron.training.checkpointing.locate import CheckpointType, _load_base_checkpoint
from megatron.training.checkpointing.model_args import check_checkpoint_args, load_args_from_checkpoint
from megatron.training.checkpointing.names import fix_query_key_value_ordering
from megatron.training.checkpointing.publishing import cleanup_old_non_persistent_checkpoint
from megatron.training.checkpointing.rng import get_rng_state
from megatron.training.checkpointing.save import maybe_save_dataloader_state, save_checkpoint
from megatron.training.checkpointing.state import generate_state_dict
from megatron.training.checkpointing.tracker import (
    checkpoint_exists,
    get_checkpoint_tracker_filename,
    read_metadata,
)
from megatron.training.checkpointing.version import get_checkpoint_version, set_checkpoint_version
from megatron.training.global_vars import get_args

__getattr__ = unbuilt.names_of(__name__)
