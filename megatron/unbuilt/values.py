"""Names of unbuilt parts that are neither a class nor a function without code, with their values."""

from dataclasses import dataclass
from typing import Any

from megatron.unbuilt.table import names_by_module


@dataclass(frozen=True)
class ExceptionClass:
    """An exception class: scripts name it in ``except``; ``base`` is another one of the same part."""

    base: str | None = None


@dataclass(frozen=True)
class Enumeration:
    """An enumeration: name -> value."""

    members: dict[str, Any]


@dataclass(frozen=True)
class Alias:
    """Another name of an object that exists, as "module:name"."""

    target: str


@dataclass(frozen=True)
class ConstantFunction:
    """A function whose result is known although its part is not built."""

    result: Any


# "module:name", by the first module that lists the name
VALUES: dict[str, Any] = {
    "megatron.core.dist_checkpointing.core:CONFIG_FNAME": "metadata.json",
    "megatron.core.dist_checkpointing.core:CheckpointingException": ExceptionClass(),
    "megatron.core.dist_checkpointing.exchange_utils:is_float8tensor": ConstantFunction(False),
    "megatron.core.dist_checkpointing.mapping:CommonStateDict": dict[str, Any],
    "megatron.core.dist_checkpointing.mapping:ReplicaId": int | tuple[int, ...],
    "megatron.core.dist_checkpointing.mapping:ShardedStateDict": dict[str, Any],
    "megatron.core.dist_checkpointing.mapping:StateDict": dict[str, Any],
    "megatron.core.dist_checkpointing.strategies.base:StrategyAction": Enumeration(
        {
            "LOAD_COMMON": "load_common",
            "LOAD_SHARDED": "load_sharded",
            "SAVE_COMMON": "save_common",
            "SAVE_SHARDED": "save_sharded",
        }
    ),
    "megatron.core.dist_checkpointing.strategies.common:COMMON_STATE_FNAME": "common.pt",
    "megatron.core.dist_checkpointing.validation:StrictHandling": Enumeration(
        {
            "ASSUME_OK_UNEXPECTED": "assume_ok_unexpected",
            "LOG_UNEXPECTED": "log_unexpected",
            "LOG_ALL": "log_all",
            "RAISE_UNEXPECTED": "raise_unexpected",
            "RAISE_ALL": "raise_all",
            "RETURN_UNEXPECTED": "return_unexpected",
            "RETURN_ALL": "return_all",
            "IGNORE_ALL": "ignore_all",
        }
    ),
    "megatron.core.distributed.custom_fsdp.fully_sharded_data_parallel:TrainingState": Enumeration(
        {"FORWARD": 1, "PRE_BACKWARD": 2, "POST_BACKWARD": 3, "IDLE": 4}
    ),
    "megatron.core.distributed.custom_fsdp.param_and_grad_buffer:BucketStatus": Enumeration(
        {"EMPTY": 1, "COMMUNICATING": 2, "READY_TO_USE": 3}
    ),
    "megatron.core.distributed.custom_fsdp.param_and_grad_buffer:PrefetchOrder": Enumeration(
        {"FORWARD_PASS_ORDER": 0, "BACKWARD_PASS_ORDER": 1}
    ),
    "megatron.core.export.data_type:DataType": Enumeration({"bfloat16": 1, "float16": 2, "float32": 3}),
    "megatron.core.export.model_type:ModelType": Enumeration(
        {"gpt": 1, "gptnext": 2, "llama": 3, "falcon": 4, "starcoder": 5, "mixtral": 6, "gemma": 7}
    ),
    "megatron.core.fp8_utils:is_float8tensor": ConstantFunction(False),
    "megatron.core.inference.contexts:ContextOverflowError": ExceptionClass(),
    "megatron.core.inference.contexts:ChunkOverflowError": ExceptionClass("ContextOverflowError"),
    "megatron.core.inference.contexts:RequestOverflowError": ExceptionClass("ContextOverflowError"),
    "megatron.core.inference.contexts:TokenOverflowError": ExceptionClass("ContextOverflowError"),
    "megatron.core.inference.inference_request:Status": Enumeration(
        {
            "WAITING_IN_QUEUE": 1,
            "ACTIVE_AND_GENERATING_TOKENS": 2,
            "ACTIVE_BUT_NOT_GENERATING_TOKENS": 3,
            "COMPLETED": 4,
        }
    ),
    "megatron.core.models.bert.bert_model:get_te_version": Alias("megatron.core.utils:get_te_version"),
    "megatron.core.models.multimodal.llava_model:DEFAULT_IMAGE_TOKEN_INDEX": -200,
    "megatron.core.models.multimodal.llava_model:IGNORE_INDEX": -100,
    "megatron.core.models.multimodal.llava_model:IMAGE_TOKEN": "<image>",
    "megatron.core.models.multimodal.llava_model:VIDEO_TOKEN": "<video>",
    "megatron.core.transformer.cuda_graphs:is_graph_capturing": ConstantFunction(False),
    "megatron.legacy.fused_kernels:load": ConstantFunction(None),
    "megatron.legacy.model.enums:AttnMaskType": Alias("megatron.core.transformer.enums:AttnMaskType"),
    "megatron.legacy.model.enums:AttnType": Alias("megatron.core.transformer.enums:AttnType"),
    "megatron.legacy.model.enums:LayerType": Enumeration(
        {
            "encoder": 1,
            "decoder": 2,
            "retro_encoder": 3,
            "retro_decoder": 4,
            "retro_decoder_with_retriever": 5,
        }
    ),
    "megatron.legacy.model.module:MegatronModule": Alias("megatron.core.transformer.module:MegatronModule"),
    "megatron.legacy.model.module:float16_to_fp32": Alias("megatron.core.transformer.module:float16_to_fp32"),
    "megatron.legacy.model.module:fp32_to_float16": Alias("megatron.core.transformer.module:fp32_to_float16"),
    "megatron.training.async_utils:is_empty_async_queue": ConstantFunction(True),
    "megatron.training.async_utils:maybe_finalize_async_save": ConstantFunction(None),
}
# Calls at points of a run where there is nothing to do here: no service to report to, nothing to compile.
_NOTHING_TO_DO = """
    megatron.training.ft_integration: get_rank_monitor_client on_checkpoint_loaded on_checkpointing_end
        on_checkpointing_start on_eval_step_end on_eval_step_start on_training_step_end
        on_training_step_start shutdown
    megatron.training.initialize: _compile_dependencies _init_autoresume _initialize_tp_communicators
        _warmup_jit_function
    megatron.training.one_logger_utils: finish on_pretrain_start on_save_checkpoint_end
        on_save_checkpoint_start on_save_checkpoint_success on_train_start track_app_tag
        track_config_flags track_e2e_metrics
"""
VALUES |= {
    f"{module}:{name}": ConstantFunction(None)
    for module, names in names_by_module(_NOTHING_TO_DO).items()
    for name in names
}
