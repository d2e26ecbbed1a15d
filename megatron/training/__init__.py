"""The application: flags, configs, the training loop, logs and checkpoints.

Names are resolved on first use, so that a text tool that needs the tokenizers alone does not load the
training loop.
"""

from importlib import import_module

_HOMES = {
    "get_adlr_autoresume": "global_vars",
    "get_args": "global_vars",
    "get_one_logger": "global_vars",
    "get_signal_handler": "global_vars",
    "get_tensorboard_writer": "global_vars",
    "get_timers": "global_vars",
    "get_tokenizer": "global_vars",
    "get_wandb_writer": "global_vars",
    "initialize_megatron": "initialize",
    "get_model": "training",
    "get_train_valid_test_num_samples": "training",
    "pretrain": "training",
    "is_last_rank": "utils",
    "print_rank_0": "utils",
    "print_rank_last": "utils",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
