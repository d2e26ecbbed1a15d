"""Rules about saving and loading."""

from argparse import Namespace
from collections.abc import Collection

from megatron.training.arguments.problem import Problem


def saving_has_a_period(args: Namespace, given: Collection[str]) -> list[Problem]:
    """--save says where; --save-interval says when."""
    if args.save is not None and args.save_interval is None:
        return [Problem("--save", args.save, "needs --save-interval", "for example --save-interval 1000")]
    return []


def loading_has_a_source(args: Namespace, given: Collection[str]) -> list[Problem]:
    """Settings are taken from a checkpoint only when one is named, and only one side wins."""
    problems = []
    if args.use_checkpoint_args and args.load is None and args.pretrained_checkpoint is None:
        problems.append(Problem("--use-checkpoint-args", None, "needs --load", "add --load DIR"))
    if args.override_opt_param_scheduler and args.use_checkpoint_opt_param_scheduler:
        problems.append(
            Problem(
                "--override-opt_param-scheduler",
                None,
                "excludes --use-checkpoint-opt_param-scheduler",
                "keep the first to follow the command line, the second to follow the checkpoint",
            )
        )
    return problems


def weights_have_a_source(args: Namespace, given: Collection[str]) -> list[Problem]:
    """Weights that are not drawn are loaded."""
    if args.perform_initialization or args.load is not None or args.pretrained_checkpoint is not None:
        return []
    rule = "leaves the weights as the memory happens to be, so it needs --load"
    return [Problem("--no-initialization", None, rule, "add --load DIR, or leave it out")]


RULES = (saving_has_a_period, loading_has_a_source, weights_have_a_source)
