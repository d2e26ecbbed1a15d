"""Arguments taken over from a checkpoint."""

from argparse import Namespace
from pathlib import Path

import pytest
import torch

from megatron.core.errors import CheckpointError, ConfigError
from megatron.training import checkpointing
from megatron.training.checkpointing import model_args


def command_line(load: Path | str | None, **given) -> Namespace:
    fields = (*model_args.FILL, *model_args.PARALLEL_FILL)
    defaults = dict.fromkeys(fields) | {
        "tokenizer_model": None,
        "normalization": "LayerNorm",
        "swiglu": False,
    }
    settings = {"load": load and str(load), "ckpt_step": None, "exit_on_missing_checkpoint": False}
    return Namespace(**{**defaults, **settings, **given})


def test_arguments_of_an_original_checkpoint_are_taken_over(golden: Path, capsys: pytest.CaptureFixture):
    args = command_line(golden / "ckpt" / "torch_tp1pp1", hidden_size=32, swiglu=False)
    result, stored = checkpointing.load_args_from_checkpoint(args)
    assert result is args and stored.seq_length == 16
    # filled because not given; kept because given; overwritten because it defines the weights
    assert (args.num_layers, args.ffn_hidden_size, args.padded_vocab_size, args.kv_channels) == (2, 32, 64, 4)
    assert args.hidden_size == 32
    assert (args.swiglu, args.normalization, args.num_query_groups) == (True, "RMSNorm", 2)
    assert (args.position_embedding_type, args.add_bias_linear, args.norm_epsilon) == ("rope", False, 1e-5)
    assert args.iteration == 4
    assert not hasattr(args, "tensor_model_parallel_size")
    # The file says moe_ffn_hidden_size 32 and kv_lora_rank 32, but its model has neither experts nor latents.
    assert not hasattr(args, "moe_ffn_hidden_size") and not hasattr(args, "kv_lora_rank")
    lines = capsys.readouterr().out.splitlines()
    assert "Setting num_layers to 2 from checkpoint" in lines
    assert "Setting swiglu to True from checkpoint" in lines
    assert "Checkpoint did not provide arguments num_experts" in lines
    assert not any("hidden_size to 16" in line and "ffn" not in line for line in lines)


def test_arguments_are_found_under_any_parallel_layout(golden: Path):
    args = command_line(golden / "ckpt" / "torch_tp2pp2", use_mp_args_from_checkpoint_args=True)
    checkpointing.load_args_from_checkpoint(args)
    assert (args.tensor_model_parallel_size, args.pipeline_model_parallel_size) == (2, 2)
    assert args.position_embedding_type == "learned_absolute"
    assert not args.untie_embeddings_and_output_weights


def write(directory: Path, version: float = 3.0, **stored) -> Path:
    file = directory / "iter_0000001" / "mp_rank_00" / "model_optim_rng.pt"
    file.parent.mkdir(parents=True)
    torch.save(
        {"args": Namespace(**stored), "model": {}, "iteration": 1, "checkpoint_version": version}, file
    )
    (directory / "latest_checkpointed_iteration.txt").write_text("1")
    return directory


@pytest.mark.parametrize(("use", "expected"), [(True, "stored.model"), (False, "mine.model")])
def test_tokenizer_model_of_the_command_line_is_kept_on_request(tmp_path: Path, use: bool, expected: str):
    write(tmp_path, tokenizer_model="stored.model", tokenizer_type="Llama2Tokenizer")
    args = command_line(tmp_path, tokenizer_model="mine.model", use_tokenizer_model_from_checkpoint_args=use)
    checkpointing.load_args_from_checkpoint(args)
    assert (args.tokenizer_model, args.tokenizer_type) == (expected, "Llama2Tokenizer")


def test_arguments_of_unused_features_are_not_taken_over(tmp_path: Path):
    write(tmp_path, num_experts=8, moe_router_topk=3, multi_latent_attention=True, kv_lora_rank=64)
    args = command_line(tmp_path)
    checkpointing.load_args_from_checkpoint(args)
    assert (args.num_experts, args.moe_router_topk, args.kv_lora_rank) == (8, 3, 64)


def test_old_argument_spellings_are_understood(tmp_path: Path):
    write(tmp_path, version=2.0, disable_bias_linear=True, model_parallel_size=4)
    args = command_line(tmp_path, use_mp_args_from_checkpoint_args=True)
    checkpointing.load_args_from_checkpoint(args)
    assert args.add_bias_linear is False and args.tensor_model_parallel_size == 4


@pytest.mark.parametrize("load", [None, "empty"])
def test_arguments_are_unchanged_without_a_checkpoint(
    tmp_path: Path, load: str | None, capsys: pytest.CaptureFixture
):
    args = command_line(load and tmp_path / load, num_layers=3)
    before = dict(vars(args))
    assert checkpointing.load_args_from_checkpoint(args) == (args, None)
    assert vars(args) == before
    assert "using provided arguments" in capsys.readouterr().out


def test_local_checkpoints_and_missing_arguments_are_refused(tmp_path: Path):
    file = write(tmp_path) / "iter_0000001" / "mp_rank_00" / "model_optim_rng.pt"
    with pytest.raises(ConfigError, match="--non-persistent-ckpt-type local"):
        checkpointing.load_args_from_checkpoint(command_line(tmp_path, non_persistent_ckpt_type="local"))
    torch.save({"model": {}}, file)
    with pytest.raises(CheckpointError, match="stores no arguments"):
        checkpointing.load_args_from_checkpoint(command_line(tmp_path))
