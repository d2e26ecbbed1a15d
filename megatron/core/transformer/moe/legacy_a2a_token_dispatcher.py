"""The dispatcher of ``alltoall_seq``, the name that most published scripts ask for."""

from megatron.core.errors import ConfigError
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig


class MoEAlltoAllSEQTokenDispatcher(MoEAlltoAllTokenDispatcher):
    """Sends rows from the parts of the sequence that tensor-parallel ranks hold.

    Every token reaches the same experts and gets the same sum as with ``alltoall``, so the exchange is the
    same; experts are split as dense layers are.

    Args:
        num_local_experts: experts of this rank.
        local_expert_indices: their numbers among all experts.
        config: model config.

    Raises:
        ConfigError: experts are split over another number of ranks than dense layers.
    """

    def __init__(self, num_local_experts: int, local_expert_indices: list[int], config: TransformerConfig):
        if config.expert_tensor_parallel_size != config.tensor_model_parallel_size:
            raise ConfigError(
                "moe_token_dispatcher_type alltoall_seq: expert_tensor_parallel_size "
                f"{config.expert_tensor_parallel_size} must equal tensor_model_parallel_size "
                f"{config.tensor_model_parallel_size}; use alltoall"
            )
        super().__init__(num_local_experts, local_expert_indices, config)
