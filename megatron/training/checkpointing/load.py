"""Loading a checkpoint: find it, check that it fits, and put every part back."""

import argparse
import os
from typing import Any

import torch

from megatron.core.errors import CheckpointError
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.training import wandb_utils
from megatron.training.agreement import any_rank, extremes, failing_together
from megatron.training.checkpointing import layout, locate, optimizer_state, parameter_names, run_context
from megatron.training.checkpointing.locate import _load_base_checkpoint
from megatron.training.checkpointing.model_args import flags_to_change
from megatron.training.checkpointing.run_context import get_checkpoint_version, set_checkpoint_version
from megatron.training.checkpointing.save import describe_rank
from megatron.training.checkpointing.state import model_keys, set_rng_state
from megatron.training.utils import print_rank_0, unwrap_model


def load_checkpoint(
    ddp_model: list[torch.nn.Module],
    optimizer: Any,
    opt_param_scheduler: Any,
    load_arg: str = "load",
    strict: bool = True,
    checkpointing_context: dict[str, Any] | None = None,
    skip_load_to_model_and_opt: bool = False,
) -> tuple[int, float]:
    """Load the checkpoint that the arguments name into a run.

    Args:
        ddp_model: model chunks of this rank, wrapped or not.
        optimizer: optimizer or None.
        opt_param_scheduler: schedule or None.
        load_arg: argument that holds the directory.
        strict: refuse a checkpoint whose parameters are not exactly the model's.
        checkpointing_context: caches of sharded formats.
        skip_load_to_model_and_opt: restore counters and random states only.

    Returns:
        Iterations finished and floating-point operations done; (0, 0) where there is no checkpoint.

    Raises:
        CheckpointError: the checkpoint cannot be read or does not fit; the message says why.
    """
    args = run_context.get_args()
    load_dir = _directory_to_load(args, load_arg)
    model = unwrap_model(ddp_model, None)
    state_dict, name, release, _ = _load_base_checkpoint(
        load_dir, args, checkpointing_context=checkpointing_context
    )
    if state_dict is None:
        return 0, 0

    starts_anew = release or args.finetune
    loads_weights = not skip_load_to_model_and_opt
    continues_training = loads_weights and not starts_anew and not args.no_load_optim
    restored_optimizer = optimizer if continues_training else None
    shards = None
    with failing_together():
        set_checkpoint_version(state_dict.get("checkpoint_version", 0))
        iteration = 0 if starts_anew else _stored_iteration(state_dict, name)
        _restore_counters(args, state_dict)
        if loads_weights:
            _check_optimizer_kind(args, restored_optimizer, state_dict, name)
            if restored_optimizer is not None:
                shards = optimizer_state.read_state(restored_optimizer, name)
            _load_model_and_optimizer(args, model, restored_optimizer, state_dict, strict, name)
    _check_same_iteration(iteration, name)
    print_rank_0(f" checkpoint version {get_checkpoint_version()}")
    if restored_optimizer is not None:
        with failing_together():  # a file that does not fit is refused by all ranks of its group
            optimizer_state.distribute_state(restored_optimizer, shards)
    elif loads_weights and optimizer is not None:
        _take_over_weights(args, optimizer)
    with failing_together():
        if continues_training:
            _load_scheduler(opt_param_scheduler, state_dict, name)
        if not starts_anew:
            _restore_rerun_and_random_state(args, state_dict)
    print_rank_0(
        f"  successfully loaded checkpoint from {load_dir} {describe_rank()} at iteration {iteration}"
    )
    wandb_utils.on_load_checkpoint_success(os.path.dirname(os.path.dirname(name)), load_dir)
    return iteration, state_dict.get("num_floating_point_operations_so_far", 0)


def _take_over_weights(args: argparse.Namespace, optimizer: Any) -> None:
    """Copy the loaded weights into an optimizer that has copies of its own and is not restored itself."""
    if args.fp16 or args.bf16 or optimizer_state.is_sharded(optimizer):
        optimizer.reload_model_params()


def _restore_rerun_and_random_state(args: argparse.Namespace, state_dict: dict[str, Any]) -> None:
    if isinstance(state_dict.get("rerun_state_machine"), dict):
        get_rerun_state_machine().load_state_dict(state_dict["rerun_state_machine"])
    if not args.no_load_rng:
        set_rng_state(state_dict, args.data_parallel_random_init)


def _check_same_iteration(iteration: int, name: str) -> None:
    """Refuse a directory that mixes the files of different saves, whose weights do not belong together."""
    lowest, highest = extremes(iteration)
    if lowest != highest:
        raise CheckpointError(
            f"the ranks' files beside {name} are of iterations {lowest} to {highest}: the directory mixes "
            "checkpoints; load another with --ckpt-step"
        )


def _check_optimizer_kind(
    args: argparse.Namespace, optimizer: Any, state_dict: dict[str, Any], name: str
) -> None:
    """Refuse optimizer state of another kind by naming the flags, before missing keys would."""
    stored = state_dict.get("args")
    if optimizer is None or stored is None:
        return
    problems = locate.optimizer_differences(stored, args)
    if problems:
        raise CheckpointError(
            f"the optimizer state of {name} does not fit: {'; '.join(problems)}. Start with the saved "
            "run's flags, or load the weights alone with --no-load-optim"
        )


def _directory_to_load(args: argparse.Namespace, load_arg: str) -> str:
    """The load directory, or that of ``--pretrained-checkpoint`` while the former is still empty."""
    load_dir = getattr(args, load_arg)
    pretrained = getattr(args, "pretrained_checkpoint", None)
    if pretrained is None or any_rank(layout.checkpoint_exists(load_dir)):
        return load_dir
    if not any_rank(layout.checkpoint_exists(pretrained)):
        raise CheckpointError(
            f"--pretrained-checkpoint {pretrained}: the directory has no {layout.TRACKER_FILE}; give the "
            "directory that holds it"
        )
    print_rank_0(
        f"Checkpoint file not found in load directory {load_dir}, attempting to finetune with {pretrained}"
    )
    args.finetune = True
    return pretrained


def _stored_iteration(state_dict: dict[str, Any], name: str) -> int:
    for key in ("iteration", "total_iters"):
        if key in state_dict:
            return state_dict[key]
    raise CheckpointError(f"{name} does not say its iteration; load its weights alone with --finetune")


def _restore_counters(args: argparse.Namespace, state_dict: dict[str, Any]) -> None:
    """Check the stored arguments, and take over how many samples have been used."""
    if "args" not in state_dict:
        print_rank_0("could not find arguments in the checkpoint ...")
        return
    if args.finetune:
        return
    stored = state_dict["args"]
    run_context.check_checkpoint_args(stored)
    for counter in ("consumed_train_samples", "skipped_train_samples", "consumed_valid_samples"):
        setattr(args, counter, getattr(stored, counter, 0))
    run_context.update_num_microbatches(consumed_samples=args.consumed_train_samples, verbose=True)


def _load_model_and_optimizer(
    args: argparse.Namespace,
    model: list[torch.nn.Module],
    optimizer: Any,
    state_dict: dict[str, Any],
    strict: bool,
    name: str,
) -> None:
    """Check everything first, then load: a checkpoint that does not fit changes nothing."""
    if optimizer is not None and "optimizer" not in state_dict:
        raise CheckpointError(
            f"{name} holds no optimizer state (it was saved with --no-save-optim); add --no-load-optim to "
            "load the rest of it"
        )
    version = get_checkpoint_version()
    assert version is not None, "set as the file was read"
    if optimizer is not None and version < 2.0:
        raise CheckpointError(
            f"{name} is of version {version}, whose optimizer state has attention rows in another order; "
            "load its weights alone with --no-load-optim"
        )
    fitted, renamed = _fitted_chunks(model, state_dict, strict, name)
    optimizer_state = None
    if optimizer is not None:
        optimizer_state = _fitted_optimizer_state(args, model, state_dict, renamed)
    for chunk, state in zip(model, fitted, strict=True):
        chunk.load_state_dict(state, strict=strict)
    parameter_names.fix_query_key_value_ordering(model, version)
    if optimizer is not None:
        optimizer.load_state_dict(optimizer_state)


def _fitted_chunks(
    model: list[torch.nn.Module], state_dict: dict[str, Any], strict: bool, name: str
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    fitted, renamed, problems = [], [], []
    for key, chunk in zip(model_keys(len(model)), model, strict=True):
        if key not in state_dict:
            found = ", ".join(k for k in state_dict if k.startswith("model"))
            raise CheckpointError(
                f"{name} holds {found}, this run has {len(model)} model chunk(s): start with the virtual "
                "pipeline size that the checkpoint was saved with"
            )
        wanted = chunk.state_dict()
        state, table = parameter_names.fit_model_state(state_dict[key], wanted)
        problems += parameter_names.differences(state, wanted, strict)
        fitted.append(state)
        renamed.append(table)
    if problems:
        raise CheckpointError(
            f"the weights in {name} are not those of this model:\n"
            + "\n".join(problems)
            + "\n"
            + _remedy_for_other_weights(state_dict)
        )
    return fitted, renamed


def _remedy_for_other_weights(state_dict: dict[str, Any]) -> str:
    """The flags that give the model of a checkpoint, as far as its arguments show."""
    vocabulary = (
        "A first dimension of another size in embedding.word_embeddings or output_layer means another "
        "vocabulary or another --make-vocab-size-divisible-by."
    )
    if "args" not in state_dict:
        return f"Start with the flags of the run that saved it. {vocabulary}"
    words = flags_to_change(state_dict["args"], run_context.get_args())
    if words:
        return f"The run that saved it had: {', '.join(words)}. Start with these. {vocabulary}"
    return f"The run that saved it had the same flags, so the code or the layer spec differs. {vocabulary}"


def _fitted_optimizer_state(
    args: argparse.Namespace,
    model: list[torch.nn.Module],
    state_dict: dict[str, Any],
    renamed: list[dict[str, str]],
) -> Any:
    """The optimizer state under current names and in the order of the current model."""
    state = _modern_names(state_dict["optimizer"])
    if not any(renamed):
        return state
    if getattr(args, "use_distributed_optimizer", False):
        raise CheckpointError(
            "the distributed optimizer's state lies in the order of another implementation of the layers: "
            f"load with --transformer-impl {getattr(state_dict.get('args'), 'transformer_impl', '?')} as it "
            "was saved, or the weights alone with --no-load-optim"
        )
    decoupled = getattr(args, "decoupled_lr", None) is not None
    stored, wanted = [], []
    for index, (key, chunk) in enumerate(zip(model_keys(len(model)), model, strict=True)):
        own = {name: param.dim() for name, param in chunk.named_parameters()}
        prefix = f"{index}:" if len(model) > 1 else ""
        in_file = [renamed[index].get(name, name) for name in state_dict[key]]
        stored += [(prefix + name, own[name]) for name in in_file if name in own]
        wanted += [(prefix + name, dimensions) for name, dimensions in own.items()]
    return optimizer_state.renumber(
        state,
        optimizer_state.group_names(stored, decoupled),
        optimizer_state.group_names(wanted, decoupled),
    )


def _modern_names(state: Any) -> Any:
    """Keys of an optimizer state that older checkpoints spelt differently."""
    if not isinstance(state, dict):
        return state
    modern = {"optimizer_state_dict": "optimizer", "fp32_from_fp16": "fp32_from_fp16_params"}
    return {modern.get(key, key): value for key, value in state.items()}


def _load_scheduler(opt_param_scheduler: Any, state_dict: dict[str, Any], name: str) -> None:
    if opt_param_scheduler is None:
        return
    for key in ("opt_param_scheduler", "lr_scheduler"):
        if key in state_dict:
            opt_param_scheduler.load_state_dict(state_dict[key])
            return
    raise CheckpointError(
        f"{name} holds no learning-rate schedule; add --no-load-optim to load the rest of it"
    )
