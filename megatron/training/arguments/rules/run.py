"""Rules about logging, profiling and the environment of a run."""

import os
from argparse import Namespace
from collections.abc import Collection

from megatron.core.errors import ConfigError
from megatron.training.arguments.problem import Problem


def logs_have_names(args: Namespace, given: Collection[str]) -> list[Problem]:
    """A W&B project needs the name of the run."""
    if args.wandb_project and not args.wandb_exp_name:
        rule = "needs --wandb-exp-name"
        return [Problem("--wandb-project", args.wandb_project, rule, "add --wandb-exp-name NAME")]
    return []


def seed_fits_generators(args: Namespace, given: Collection[str]) -> list[Problem]:
    """NumPy takes seeds of 32 bits, and ranks add their places to the seed."""
    most = 2**32 - 1 - 100 * (args.pipeline_model_parallel_size - 1)
    if args.data_parallel_random_init:
        most -= 10 * (args.data_parallel_size - 1)
    if args.seed <= most:
        return []
    rule = f"must be at most {most}, so that every rank's seed fits 32 bits"
    return [Problem("--seed", args.seed, rule, "for example --seed 1234")]


def disabled_overrides_exist(args: Namespace, given: Collection[str]) -> list[Problem]:
    """Kernels that are put aside exist under the names given."""
    names = args.disable_override
    if names is None:
        return []
    flag, example = "--disable-override", "for example --disable-override rms_norm"
    if not names:
        return [Problem(flag, None, "names no kernel", f"name one or several, {example}")]
    from megatron.core import overrides

    problems = []
    for name in names:
        rule = overrides.problem_with_name(name)
        if rule:
            problems.append(Problem(flag, name, rule, "python -m megatron_npu lists them"))
    return problems


def profile_has_a_range(args: Namespace, given: Collection[str]) -> list[Problem]:
    """Profiling ends after it begins."""
    start, end = args.profile_step_start, args.profile_step_end
    if args.profile and end < start:
        rule = f"is before --profile-step-start {start}"
        return [Problem("--profile-step-end", end, rule, f"use --profile-step-end {start + 2}")]
    return []


def buffer_sizes_name_groups(args: Namespace, given: Collection[str]) -> list[Problem]:
    """Sizes of communication buffers are numbers of MB behind names of groups."""
    from megatron.training.buffer_sizes import buffer_size_problem

    rule = buffer_size_problem(args.hccl_group_buffer or "")
    return (
        [Problem("--hccl-group-buffer", args.hccl_group_buffer, rule, "write 'dp:400;tp:300'")]
        if rule
        else []
    )


def nccl_settings_are_readable(args: Namespace, given: Collection[str]) -> list[Problem]:
    """Settings of NCCL's groups can be read where they are used."""
    path = args.nccl_communicator_config_path
    if path is None:
        return []
    from megatron.core import accelerator
    from megatron.core.process_groups import load_nccl_settings

    if accelerator.collective_backend(args.distributed_backend) != "nccl":
        return []
    try:
        load_nccl_settings(path)
    except ConfigError as error:
        return [Problem("--nccl-communicator-config-path", path, str(error), "name a YAML file of settings")]
    return []


def rejected_results_are_readable(args: Namespace, given: Collection[str]) -> list[Problem]:
    """The file of rejected results is absent, or one that can be read."""
    path = args.result_rejected_tracker_filename
    if path is None:
        return []
    from megatron.core.rerun_state_machine import RerunStateMachine

    try:
        RerunStateMachine.get_skipped_iterations_from_tracker_file(path)
    except (OSError, ValueError) as error:
        rule = f"cannot be read: {error}"
        return [Problem("--result-rejected-tracker-filename", path, rule, "name another file")]
    return []


def one_size_of_buckets(args: Namespace, given: Collection[str]) -> list[Problem]:
    """Gradient buckets are counted or measured."""
    if args.ddp_num_buckets is not None and args.ddp_bucket_size is not None:
        rule = "excludes --ddp-bucket-size"
        return [Problem("--ddp-num-buckets", args.ddp_num_buckets, rule, "keep one of them")]
    return []


def inference_threshold(args: Namespace, given: Collection[str]) -> list[Problem]:
    """The threshold splits a batch over pipeline stages."""
    threshold = args.inference_batch_times_seqlen_threshold
    if threshold > -1 and args.pipeline_model_parallel_size == 1:
        flag = "--inference-batch-times-seqlen-threshold"
        return [Problem(flag, threshold, "needs several pipeline stages", "leave it out")]
    return []


def launcher_environment(args: Namespace, given: Collection[str]) -> list[Problem]:
    """The launcher's variables are numbers, and the rank lies in the world."""
    problems = []
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        word = os.environ.get(variable)
        if word and not word.isdigit():
            rule = "the environment variable is not a whole number"
            problems.append(Problem(variable, word, rule, "start through torchrun, or unset it"))
    meeting_place = os.environ.get("MASTER_ADDR") and os.environ.get("MASTER_PORT")
    if args.world_size > 1 and not meeting_place and not _met_already():
        rule = "MASTER_ADDR and MASTER_PORT do not say where the ranks meet"
        remedy = "start through torchrun, or set both to an address and a free port of the host of rank 0"
        problems.append(Problem("WORLD_SIZE", args.world_size, rule, remedy))
    if args.world_size < 1 or args.rank >= max(1, args.world_size):
        rule = f"lies outside a world of {args.world_size}"
        problems.append(
            Problem("RANK", args.rank, rule, "start through torchrun, or unset RANK and WORLD_SIZE")
        )
    return problems


def _met_already() -> bool:
    """The program that uses this library made the process groups."""
    from torch import distributed

    return distributed.is_initialized()


RULES = (
    logs_have_names,
    seed_fits_generators,
    disabled_overrides_exist,
    profile_has_a_range,
    buffer_sizes_name_groups,
    nccl_settings_are_readable,
    rejected_results_are_readable,
    one_size_of_buckets,
    inference_threshold,
    launcher_environment,
)
