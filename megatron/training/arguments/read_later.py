"""Arguments and config fields that are first read when set-up is over, or before it is looked on.

Not to have been read by the end of set-up says nothing about these. Some wait for something that need not
happen, such as an evaluation; ``no_effect`` names the company in which it cannot.
"""


def _when(moment: str, names: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), moment)


READ_LATER: dict[str, str] = {
    **_when(
        "while the arguments are checked",
        "apply_rope_fusion deterministic_mode encoder_num_layers encoder_seq_length",
    ),
    **_when(
        "while they are completed from a checkpoint",
        "use_checkpoint_args use_mp_args_from_checkpoint_args use_tokenizer_model_from_checkpoint_args",
    ),
    **_when(
        "when a checkpoint is read or written",
        "ckpt_format exit_on_missing_checkpoint no_save_optim no_save_rng save_interval",
    ),
    **_when(
        "in forward",
        "apply_residual_connection_post_layernorm clone_scatter_output_in_embedding fp32_residual_connection "
        "recompute_method recompute_num_layers distribute_saved_activations window_size",
    ),
    **_when("by the pipeline's schedule", "microbatch_group_size_per_vp_stage pipeline_schedule"),
    **_when(
        "in every step",
        "align_grad_reduce align_param_gather barrier_with_L1_time check_for_large_grads "
        "check_for_spiky_loss check_weight_hash_across_dp_replicas_interval "
        "empty_unused_memory_level exit_duration_in_mins exit_interval iterations_to_skip "
        "log_num_zeros_in_grad log_params_norm manual_gc manual_gc_interval train_sync_interval",
    ),
    **_when(
        "when the first step begins",
        "disable_straggler_on_startup log_straggler straggler_ctrlr_port straggler_minmax_count",
    ),
    **_when("in evaluation", "log_validation_ppl_to_tensorboard manual_gc_eval"),
    **_when(
        "when a profile begins",
        "profile profile_ranks profile_step_start profile_step_end use_pytorch_profiler",
    ),
    **_when("when ranks meet, which may be over", "rendezvous_timeout"),
    **_when(
        "when something is logged",
        "log_interval log_loss_scale_to_tensorboard log_memory_to_tensorboard log_throughput "
        "log_timers_to_tensorboard log_world_size_to_tensorboard tensorboard_log_interval",
    ),
}
