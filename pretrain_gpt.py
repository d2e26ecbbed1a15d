"""Pretrain a GPT: python pretrain_gpt.py --help.

The model, the batch and the loss are in megatron/cli/pretrain_gpt.py. Imported, this module is that one, so
that a function which is replaced here is replaced for the training too.
"""

import sys

import megatron  # before all else: says which Python is needed

if __name__ == "__main__":
    from megatron.cli.command import run

    run("train")
else:
    from megatron.cli import pretrain_gpt
    from megatron.cli.pretrain_gpt import (
        core_gpt_dataset_config_from_args,
        forward_step,
        get_batch,
        is_dataset_built_on_rank,
        loss_func,
        main,
        model_provider,
        train_valid_test_datasets_provider,
    )

    sys.modules[__name__] = pretrain_gpt
