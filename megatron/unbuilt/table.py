"""Names of parts that are not built yet, and what to use instead.

A row is removed when its name is built: ``tests/unit_tests/test_unbuilt_names.py`` fails on rows whose module
has such a name of its own. Names are Megatron-LM core_r0.12.1's.
"""

import functools
from dataclasses import dataclass


def names_by_module(text: str) -> dict[str, list[str]]:
    """Parse repeated "module: NAME NAME ..."."""
    found: dict[str, list[str]] = {}
    module: list[str] = []
    for word in text.split():
        if word.endswith(":"):
            module = found.setdefault(word[:-1], [])
        else:
            module.append(word)
    return found


@dataclass(frozen=True, eq=False)
class Feature:
    """A part without code.

    Args:
        what: names it in messages.
        instead: a sentence that says what can be used today.
        names: "module: NAME NAME ..." over and over; a module without names is all there is to import.
    """

    what: str
    instead: str
    names: str

    @functools.cached_property
    def modules(self) -> dict[str, list[str]]:
        """Module -> names that scripts import from it."""
        return names_by_module(self.names)


FEATURES = [
    Feature(
        "DeepEP kernels",
        "Use --moe-token-dispatcher-type flex without --moe-enable-deepep, which exchanges tokens itself.",
        """
        megatron.core.transformer.moe.fused_a2a: FusedCombine FusedDispatch fused_combine fused_dispatch
            get_buffer
        """,
    ),
    Feature(
        "distributed checkpoints",
        "Use --ckpt-format torch, or save_checkpoint and load_checkpoint of megatron.training.checkpointing.",
        """
        megatron.core.transformer.moe.experts: expert_dist_ckpt_decorator
        megatron.core.dist_checkpointing: LocalNonpersistentObject ShardedObject ShardedTensor
            check_is_distributed_checkpoint load load_common_state_dict load_plain_tensors
            load_tensors_metadata remove_sharded_tensors save
        megatron.core.dist_checkpointing.core: CONFIG_FNAME CheckpointingConfig CheckpointingException
            check_is_distributed_checkpoint maybe_load_config save_config
        megatron.core.dist_checkpointing.dict_utils: dict_list_map_inplace dict_list_map_outplace
            dict_map dict_map_with_key diff extract_matching_values inspect_types map_reduce merge
            nested_items_iter nested_values
        megatron.core.dist_checkpointing.exchange_utils: ShardDistribution
            _get_empty_tensor_for_exchange determine_main_replica_uniform_distribution
            distribute_shards_to_ranks exchange_by_distribution exchange_loaded_objects_gather_object
            exchange_loaded_tensors_broadcast exchange_loaded_tensors_gather_object
            exchange_loaded_tensors_gather_rounds is_float8tensor
        megatron.core.dist_checkpointing.mapping: CommonStateDict LocalNonpersistentObject ReplicaId
            ShardedBase ShardedObject ShardedStateDict ShardedTensor ShardedTensorFactory StateDict
            apply_factories apply_factory_merges is_main_replica
        megatron.core.dist_checkpointing.optimizer: get_optim_param_to_id_map
            get_param_id_to_sharded_param_map make_sharded_optimizer_tensor
            optim_state_to_sharding_state
        megatron.core.dist_checkpointing.serialization: get_default_load_sharded_strategy
            get_default_save_common_strategy get_default_save_sharded_strategy load
            load_common_state_dict load_plain_tensors load_sharded_metadata load_tensors_metadata
            remove_sharded_tensors save
        megatron.core.dist_checkpointing.state_dict_utils: filter_out_empty_flatten_tensor
            load_preprocess save_preprocess
        megatron.core.dist_checkpointing.strategies.async_utils: AsyncCaller AsyncCallsQueue
            AsyncRequest PersistentAsyncCaller TemporalAsyncCaller add_finalize_fn execute_sync freeze
        megatron.core.dist_checkpointing.strategies.base: AsyncSaveShardedStrategy LoadCommonStrategy
            LoadShardedStrategy LoadStrategyBase SaveCommonStrategy SaveShardedStrategy SaveStrategyBase
            StrategyAction get_default_strategy register_default_strategy
        megatron.core.dist_checkpointing.strategies.common: COMMON_STATE_FNAME TorchCommonLoadStrategy
            TorchCommonSaveStrategy register_default_common_strategies
        megatron.core.dist_checkpointing.strategies.filesystem_async: FileSystemWriterAsync
        megatron.core.dist_checkpointing.strategies.fully_parallel: FullyParallelLoadStrategyWrapper
            FullyParallelSaveStrategyWrapper _sharded_tensor_shard_id
            determine_main_replica_uniform_distribution
            distribute_main_replicas_with_precomputed_distribution logger
        megatron.core.dist_checkpointing.strategies.resharding: TensorReformulationMetadata
            apply_nd_flattened_tensors_reformulation is_nd_flattened_tensor
            nd_flattened_tensor_reformulated_global_shape reformulate_single_nd_flattened_tensor
            restore_nd_flattened_tensors_formulation
        megatron.core.dist_checkpointing.strategies.state_dict_saver: save_state_dict_async_finalize
            save_state_dict_async_plan verify_global_md_reuse
        megatron.core.dist_checkpointing.strategies.torch: MCoreLoadPlanner MCoreSavePlan
            MCoreSavePlanner TorchDistLoadShardedStrategy TorchDistSaveShardedStrategy
            flatten_state_dict get_reformulation_metadata mcore_to_pyt_state_dict
            register_default_torch_strategies sharded_tensor_to_torch_sharded_tensor
        megatron.core.dist_checkpointing.strategies.two_stage: TwoStageDataParallelLoadShardedStrategy
            sharded_tensor_chunk_id timed
        megatron.core.dist_checkpointing.tensor_aware_state_dict: MCoreTensorAwareStateDict
        megatron.core.dist_checkpointing.utils: _sharded_tensor_shard_id add_prefix_for_sharding
            apply_prefix_mapping debug_msg debug_time extract_nonpersistent extract_sharded_base
            extract_sharded_tensors extract_sharded_tensors_and_factories
            extract_sharded_tensors_or_nonpersistent logger_stack replace_prefix_for_sharding zip_strict
        megatron.core.dist_checkpointing.validation: StrictHandling adjust_non_strict_load
            determine_global_metadata maybe_report_missing_and_unexpected_keys parse_strict_flag
            validate_integrity_and_strict_load validate_sharded_objects_handling
            validate_sharding_integrity verify_checkpoint_and_load_strategy
        megatron.core.transformer.mlp: apply_swiglu_sharded_factory
        megatron.core.transformer.multi_token_prediction: tie_output_layer_state_dict
            tie_word_embeddings_state_dict
        megatron.core.transformer.utils: make_sharded_object_for_checkpoint
            make_sharded_tensors_for_checkpoint sharded_state_dict_default
        megatron.core.utils: make_sharded_tensor_for_checkpoint make_tp_sharded_tensor_for_checkpoint
        megatron.training.checkpointing: _to_dtensor
        """,
    ),
    Feature(
        "fully sharded data parallelism",
        "Use DistributedDataParallel with use_distributed_optimizer=True (--use-distributed-optimizer).",
        """
        megatron.core.distributed: TorchFullyShardedDataParallel
        megatron.core.distributed.custom_fsdp: FullyShardedDataParallel
        megatron.core.distributed.custom_fsdp.fully_sharded_data_parallel: FullyShardedDataParallel
            RegisterFSDPBackwardFunction TrainingState
        megatron.core.distributed.custom_fsdp.param_and_grad_buffer: BucketStatus PrefetchOrder
            _free_storage _p_assert gradient_reduce_preprocessing
        megatron.core.distributed.torch_fully_sharded_data_parallel: TorchFullyShardedDataParallel
        """,
    ),
    Feature(
        "the T5 model",
        "GPTModel is what can be trained.",
        """
        megatron.core.datasets.t5_dataset: T5MaskedWordPieceDataset T5MaskedWordPieceDatasetConfig
        megatron.core.models.T5: T5Model
        megatron.core.models.T5.t5_model: T5LMHead T5Model t5_extended_attention_mask t5_position_ids
        megatron.core.models.T5.t5_spec: decoder_model_with_local_spec
            decoder_model_with_transformer_engine_default_spec encoder_model_with_local_spec
            encoder_model_with_transformer_engine_default_spec get_t5_decoder_with_local_block_spec
            get_t5_decoder_with_transformer_engine_block_spec get_t5_encoder_with_local_block_spec
            get_t5_encoder_with_transformer_engine_block_spec
        megatron.core.models.common.embeddings.relative_pos_embedding: RelativePositionEmbedding
        """,
    ),
    Feature(
        "the BERT model",
        "GPTModel is what can be trained.",
        """
        megatron.core.datasets.bert_dataset: BERTMaskedWordPieceDataset BERTMaskedWordPieceDatasetConfig
        megatron.core.datasets.masked_dataset: MaskedWordPieceDataset MaskedWordPieceDatasetConfig
        megatron.core.models.bert.bert_layer_specs: bert_layer_local_spec
            bert_layer_with_transformer_engine_spec get_bert_layer_with_transformer_engine_spec
        megatron.core.models.bert.bert_lm_head: BertLMHead
        megatron.core.models.bert.bert_model: BertModel get_te_version
        megatron.core.models.bert.pooler: Pooler
        """,
    ),
    Feature(
        "the inference engine of the library",
        "megatron.training.generation continues a prompt with any model.",
        """
        megatron.core.inference.communication_utils: broadcast_from_last_pipeline_stage
        megatron.core.inference.contexts: BaseInferenceContext ChunkOverflowError ContextOverflowError
            DynamicInferenceContext RequestOverflowError StaticInferenceContext TokenOverflowError
        megatron.core.inference.engines: AbstractEngine DynamicInferenceEngine StaticInferenceEngine
        megatron.core.inference.engines.abstract_engine: AbstractEngine
        megatron.core.inference.engines.mcore_engine: MCoreEngine
        megatron.core.inference.inference_request: InferenceRequest Status VLMInferenceRequest
        megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper: GPTInferenceWrapper
        megatron.core.inference.model_inference_wrappers.inference_wrapper_config:
            InferenceWrapperConfig
        megatron.core.inference.model_inference_wrappers.multimodal.vlm_inference_wrapper:
            VLMInferenceWrapper
        megatron.core.inference.model_inference_wrappers.t5.t5_inference_wrapper: T5InferenceWrapper
        megatron.core.inference.sampling_params: SamplingParams
        megatron.core.inference.scheduler: Scheduler
        megatron.core.inference.text_generation_controllers.encoder_decoder_text_generation_controller:
            EncoderDecoderTextGenerationController
        megatron.core.inference.text_generation_controllers.text_generation_controller:
            TextGenerationController
        megatron.core.inference.text_generation_controllers.vlm_text_generation_controller:
            VLMTextGenerationController
        megatron.core.inference.utils: Counter
        """,
    ),
    Feature(
        "the text generation server",
        "megatron.training.generation continues a prompt with any model.",
        """
        megatron.inference.text_generation: generate_and_post_process
        megatron.inference.text_generation.api: generate_and_post_process
        megatron.inference.text_generation.beam_utils: BeamHypotheses
        megatron.inference.text_generation.communication: broadcast_float_list
            broadcast_from_last_pipeline_stage broadcast_from_last_to_first_pipeline_stage
            broadcast_int_list broadcast_tensor copy_from_last_to_first_pipeline_stage
        megatron.inference.text_generation.forward_step: ForwardStep _get_recv_buffer_dtype
        megatron.inference.text_generation.generation: _build_attention_mask_and_position_ids
            beam_search_and_return_on_first_stage generate_tokens_probs_and_return_on_first_stage
            score_and_return_on_first_stage
        megatron.inference.text_generation.mcore_engine_server: ModelInferenceWrapperServer
            run_mcore_engine
        megatron.inference.text_generation.sampling: sample
        megatron.inference.text_generation.tokenization: detokenize_generations tokenize_prompts
        megatron.inference.text_generation_server: MegatronServer
        """,
    ),
    Feature(
        "vision and multimodal models",
        "GPTModel is what can be trained.",
        """
        megatron.core.datasets.multimodal_dataset: MockMultimodalDataset MultimodalDatasetConfig
        megatron.core.models.common.embeddings: MultimodalRotaryEmbedding
        megatron.core.models.common.embeddings.rotary_pos_embedding: MultimodalRotaryEmbedding
        megatron.core.models.huggingface.module: get_hf_model_type
        megatron.core.models.multimodal.context_parallel:
        megatron.core.models.multimodal.llava_model: DEFAULT_IMAGE_TOKEN_INDEX IGNORE_INDEX IMAGE_TOKEN
            LLaVAModel VIDEO_TOKEN
        megatron.core.models.multimodal.llava_spec: decoder_model_with_local_default_spec
            decoder_model_with_transformer_engine_default_spec
        megatron.core.models.vision.clip_vit_model: CLIPViTModel get_num_image_embeddings
        megatron.core.models.vision.multimodal_projector: MultimodalProjector
        megatron.core.models.vision.radio: RADIOViTModel
        megatron.core.models.vision.vit_layer_specs: get_vit_layer_with_local_spec
            get_vit_layer_with_transformer_engine_spec
        megatron.legacy.data.autoaugment: ImageNetPolicy
        megatron.legacy.data.vit_dataset: build_train_valid_datasets
        megatron.legacy.model.vision.classification: MitClassificationModel VitClassificationModel
        megatron.legacy.model.vision.dino: DINOPretrainModel
        megatron.legacy.model.vision.inpainting: MitInpaintingModel VitInpaintingModel
        megatron.legacy.model.vision.knn_monitor: compute_feature_bank get_feature_bank knn_predict
        megatron.legacy.model.vision.mit_backbone: mit_b3 mit_b5
        megatron.legacy.model.vision.utils: resize
        megatron.legacy.model.vision.vit_backbone: VitBackbone VitMlpHead
        megatron.training.tokenizer.multimodal_tokenizer: MultimodalTokenizer
        """,
    ),
    Feature(
        "retrieval-augmented models (Retro)",
        "GPTModel is what can be trained.",
        """
        megatron.core.datasets.retro.config: RetroBertEmbedders RetroGPTChunkDatasets
            RetroPreprocessingConfig RetroTokenizers
        megatron.core.datasets.retro.db: build_db
        megatron.core.datasets.retro.db.dataset: DBDataset
        megatron.core.datasets.retro.db.utils: get_indexed_dataset_infos get_merged_train_dataset
        megatron.core.datasets.retro.index: add_to_index train_index
        megatron.core.datasets.retro.query.gpt_chunk_dataset: build_gpt_chunk_datasets_from_gpt_datasets
        megatron.core.datasets.retro.query.multi_split_gpt_dataset: MultiSplitGPTDataset
            MultiSplitGPTDatasetConfig
        megatron.core.datasets.retro.query.query: query_neighbors
        megatron.core.datasets.retro.query.retro_dataset: RetroDataset get_retro_datasets
        megatron.core.datasets.retro.query.utils: get_query_dir
        megatron.core.datasets.retro.utils: get_blocks_by_rank retro_makedir
        megatron.core.models.retro: RetroConfig RetroModel get_retro_decoder_block_spec
        megatron.core.models.retro.decoder_attention: RetroDecoderBiasDropoutAdd
            RetroDecoderCrossAttention
        megatron.core.models.retro.decoder_spec: get_retro_decoder_layer_local_spec
            get_retro_decoder_layer_te_spec
        megatron.core.models.retro.encoder_attention: RetroEncoderBiasDropoutAdd
            RetroEncoderCrossAttention RetroEncoderLayerNorm
        megatron.core.models.retro.encoder_spec: get_retro_encoder_layer_local_spec
            get_retro_encoder_layer_te_spec
        megatron.core.models.retro.utils: get_all_true_mask get_config_path get_gpt_data_dir
        """,
    ),
    Feature(
        "Mamba and hybrid models",
        "GPTModel is what can be trained.",
        """
        megatron.core.models.mamba: MambaModel
        megatron.core.models.mamba.mamba_layer_specs: mamba_stack_spec
        megatron.core.models.mamba.mamba_model: MambaModel
        megatron.core.post_training.modelopt.mamba.model_specs: get_mamba_stack_modelopt_spec
        megatron.core.ssm.mamba_block: MambaStack MambaStackSubmodules
        megatron.core.ssm.mamba_hybrid_layer_allocation: Symbols allocate_layers
        megatron.core.ssm.mamba_layer: MambaLayer MambaLayerSubmodules
        megatron.core.ssm.mamba_mixer: MambaMixer MambaMixerSubmodules
        megatron.core.ssm.mlp_layer: MLPLayer
        """,
    ),
    Feature(
        "models with layers of different sizes",
        "Use get_gpt_decoder_block_spec or a spec of your own.",
        """
        megatron.core.models.gpt.heterogeneous.heterogeneous_layer_specs:
            get_gpt_heterogeneous_layer_spec
        megatron.core.transformer.heterogeneous.heterogeneous_config: HeterogeneousTransformerConfig
        """,
    ),
    Feature(
        "8-bit floating point",
        "Train in bf16 (--bf16) or fp16 (--fp16).",
        """
        megatron.core.extensions.transformer_engine: TEDelayedScaling
        megatron.core.fp8_utils: correct_amax_history_if_needed get_fp8_context is_float8tensor
            modify_underlying_storage
        megatron.training.checkpointing: fix_fp8_params_lose_precision_when_loading_dist_ckpt
        """,
    ),
    Feature(
        "offloading to host memory",
        "Save memory by recomputing (--recompute-granularity) or --use-distributed-optimizer.",
        """
        megatron.core.extensions.transformer_engine: get_cpu_offload_context
        megatron.core.optimizer: CPUAdam CPUSGD HybridDeviceOptimizer
        megatron.core.optimizer.cpu_offloading: HybridDeviceOptimizer
        megatron.core.optimizer.cpu_offloading.hybrid_optimizer: HybridDeviceOptimizer
        """,
    ),
    Feature(
        "statistics of results that differ between runs",
        "Leave out --rerun-mode report_determinism_stats.",
        """
        megatron.core.rerun_state_machine: QuickStats
        """,
    ),
    Feature(
        "asynchronous saves",
        "Saves are synchronous: leave out --async-save.",
        """
        megatron.training.async_utils: init_persistent_async_worker is_empty_async_queue
            maybe_finalize_async_save schedule_async_save
        """,
    ),
    Feature(
        "the hooks of NVIDIA's clusters (one_logger, fault tolerance, ADLR autoresume)",
        "Use --tensorboard-dir, --exit-duration-in-mins and --exit-signal-handler.",
        """
        megatron.training.ft_integration: get_rank_monitor_client on_checkpoint_loaded
            on_checkpointing_end on_checkpointing_start on_eval_step_end on_eval_step_start
            on_training_step_end on_training_step_start setup shutdown
        megatron.training.initialize: _init_autoresume
        megatron.training.one_logger_utils: finish on_pretrain_start on_save_checkpoint_end
            on_save_checkpoint_start on_save_checkpoint_success on_train_start track_app_tag
            track_config_flags track_e2e_metrics
        megatron.training.utils: check_adlr_autoresume_termination
        """,
    ),
    Feature(
        "compiled helpers and user buffers",
        "None are needed.",
        """
        megatron.training.initialize: _compile_dependencies _initialize_tp_communicators
            _warmup_jit_function
        """,
    ),
    Feature(
        "capturing CUDA graphs",
        "Leave out --enable-cuda-graph and --external-cuda-graph.",
        """
        megatron.core.transformer.cuda_graphs: create_cudagraphs is_graph_capturing
        megatron.training.training: cuda_graph_capture cuda_graph_set_manual_hooks
            get_cuda_graph_input_data
        """,
    ),
    Feature(
        "export and post-training optimisation",
        "Checkpoints of --ckpt-format torch can be read by any tool that reads Megatron's.",
        """
        megatron.core.export.data_type: DataType
        megatron.core.export.export_config: ExportConfig
        megatron.core.export.model_type: ModelType
        megatron.core.export.trtllm.model_to_trllm_mapping.default_conversion_dict:
            DEFAULT_CONVERSION_DICT
        megatron.core.export.trtllm.trtllm_helper: TRTLLMHelper
        megatron.core.export.trtllm.trtllm_layers: TRTLLMLayers get_layer_name_without_prefix
        megatron.core.export.trtllm.trtllm_weights_converter.distributed_trtllm_model_weights_converter:
            DistributedTRTLLMModelWeightsConverter
        megatron.core.export.trtllm.trtllm_weights_converter.single_device_trtllm_model_weights_converter:
            SingleDeviceTRTLLMModelWeightsConverter
        megatron.core.post_training.modelopt.gpt.model_specs: get_gpt_modelopt_spec
        megatron.core.post_training.modelopt.gpt.state_dict_hooks: mcore_gpt_load_te_state_dict_pre_hook
        megatron.post_training.arguments: add_modelopt_args
        megatron.post_training.loss_func: loss_func
        """,
    ),
    Feature(
        "the older models that Megatron-LM keeps as legacy",
        "Use megatron.core.models.gpt.GPTModel and what megatron.core.transformer holds.",
        """
        megatron.legacy.data.dataset_utils: build_train_valid_test_datasets get_train_valid_test_split_
        megatron.legacy.fp16_deprecated.loss_scaler:
        megatron.legacy.fused_kernels: load
        megatron.legacy.model: BertModel GPTModel LayerNorm RMSNorm T5Model get_language_model
        megatron.legacy.model.classification: Classification
        megatron.legacy.model.enums: AttnMaskType AttnType LayerType
        megatron.legacy.model.fused_layer_norm: MixedFusedLayerNorm
        megatron.legacy.model.module: MegatronModule float16_to_fp32 fp32_to_float16
        megatron.legacy.model.multiple_choice: MultipleChoice
        megatron.legacy.model.rms_norm: RMSNorm
        megatron.legacy.model.transformer: FlashSelfAttention NoopTransformerLayer ParallelMLP
            ParallelTransformer ParallelTransformerLayer bias_dropout_add_fused_inference
            bias_dropout_add_fused_train get_bias_dropout_add
        """,
    ),
    Feature(
        "retrieval with bi-encoders (ICT, REALM, ORQA)",
        "GPTModel is what can be trained.",
        """
        megatron.legacy.data.biencoder_dataset_utils: get_ict_batch make_attention_mask
        megatron.legacy.data.orqa_wiki_dataset: get_open_retrieval_wiki_dataset
        megatron.legacy.data.realm_index: FaissMIPSIndex OpenRetreivalDataStore
        megatron.legacy.indexer: IndexBuilder
        megatron.legacy.model.biencoder_model: biencoder_model_provider get_model_provider
        megatron.training.checkpointing: load_biencoder_checkpoint
        """,
    ),
]
