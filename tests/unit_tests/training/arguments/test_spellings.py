"""What core says of config fields, as the command line tells it: with the flags that set them."""

import dataclasses
import re
import subprocess
import sys

import pytest

from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.arguments import spellings
from megatron.training.arguments.flags import flags_by_name


@pytest.mark.parametrize(
    ("message", "flags"),
    [
        ("leave overlap_grad_reduce out", "overlap_grad_reduce: --overlap-grad-reduce"),
        ("turn mmap_bin_files off.", "mmap_bin_files: --no-mmap-bin-files turns it off"),
        ("num_moe_experts 8: ...", "num_moe_experts: --num-experts"),
        ("set OptimizerConfig.lr to 1e-4", "OptimizerConfig.lr: --lr"),
        ("max_lr is 1, min_lr is 2", "max_lr: --lr; min_lr: --min-lr"),
        ("seq_length, and seq_length again", "seq_length: --seq-length"),
    ],
)
def test_fields_are_followed_by_their_flags(message: str, flags: str) -> None:
    assert spellings.with_flags(message) == f"{message} ({flags})"


@pytest.mark.parametrize(
    "message",
    [
        "no data set here",
        "/scratch/data_path/x.bin is cut off",
        "run no_sync() or seq_length.py, or my_own_text_document",
        "--seq-length 7: no multiple of 2 (seq_length)",
        "lr and split are words of English",
    ],
)
def test_what_names_no_field_stays_as_it_is(message: str) -> None:
    assert spellings.with_flags(message) == message


def test_every_flag_of_the_table_exists_and_every_field_belongs_to_a_config() -> None:
    for flags in spellings._OTHERWISE.values():
        words = re.findall(r"--[\w-]+", flags)
        assert words and set(words) <= set(flags_by_name()), flags
    configs = (TransformerConfig, OptimizerConfig, DistributedDataParallelConfig, GPTDatasetConfig)
    fields = {field.name for config in configs for field in dataclasses.fields(config)}
    # Arguments of the scheduler, the timers and the rerun machine, which have no config.
    others = {"max_lr", "lr_warmup_steps", "lr_decay_steps", "start_wd", "end_wd", "wd_incr_style"}
    others |= {"wd_incr_steps", "log_option", "error_injector"}
    assert {field.rpartition(".")[2] for field in spellings._OTHERWISE} <= fields | others


def test_a_program_that_fails_names_the_flags() -> None:
    code = (
        "from megatron.core.errors import ConfigError\n"
        "from megatron.training.entry import run_main\n"
        "def main(): raise ConfigError('leave overlap_grad_reduce out')\n"
        "run_main(main)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (
        done.stderr == "error: leave overlap_grad_reduce out (overlap_grad_reduce: --overlap-grad-reduce)\n"
    )
    assert done.returncode == 1
