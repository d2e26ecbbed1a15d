"""A configuration file means what the same command line means."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from megatron.core.errors import ConfigError
from megatron.training.arguments import ArgumentsError, parse_args, validate_args
from megatron.training.yaml_arguments import (
    core_config_from_args,
    core_transformer_config_from_yaml,
    load_yaml,
    validate_yaml,
)

yaml = pytest.importorskip("yaml")
FILE = """
language_model:
  num_layers: 3
  hidden_size: 64
  num_attention_heads: 4
  num_query_groups: 2
  activation_func: swiglu
  layernorm_epsilon: 1e-6
  normalization: RMSNorm
  persist_layer_norm: false
  bias_activation_fusion: false
  init_method: xavier_uniform
  window_size: [4, 0]
  softmax_scale: 0.5
  num_moe_experts: null
model_parallel:
  tensor_model_parallel_size: 1
  bf16: true
  params_dtype: null
seq_length: 32
max_position_embeddings: 32
micro_batch_size: 2
lr: 1e-3
min_lr: 0
train_iters: 20
eval_interval: 5.0
data_path: 0.5 a 0.5 ${PLACE}/b
split: 8,1,1
spec: null
attention_backend: unfused
retro_num_neighbors: 2
own_setting: kept
"""


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def run(text: str = FILE, words: str = ""):
        path = tmp_path / "config.yaml"
        path.write_text(text)
        monkeypatch.setenv("PLACE", "/data")
        monkeypatch.setattr(sys, "argv", ["pretrain", *words.split(), "--yaml-cfg", str(path)])
        return parse_args()

    return run


def test_values(read, capsys) -> None:
    args = validate_args(read(words="--fp16 --num-layers 9"))
    out = capsys.readouterr().out
    assert "--yaml-cfg replaces the command line; dropped: --fp16 --num-layers" in out
    assert "WARNING: own_setting in the YAML file is not an argument" in out
    expected = {
        "num_layers": 3,
        "num_query_groups": 2,
        "group_query_attention": True,
        "swiglu": True,
        "ffn_hidden_size": 128,
        "norm_epsilon": 1e-6,
        "lr": 1e-3,
        "min_lr": 0.0,
        "eval_interval": 5,
        "data_path": ["0.5", "a", "0.5", "/data/b"],
        "bf16": True,
        "fp16": False,
        "params_dtype": torch.bfloat16,
        "global_batch_size": 2,
        "log_interval": 100,
        "window_size": (4, 0),
        "own_setting": "kept",
        "rank": 0,
        "world_size": 1,
    }
    assert {name: getattr(args, name) for name in expected} == expected


def test_config(read) -> None:
    args = validate_yaml(read())
    config = core_transformer_config_from_yaml(args, "language_model")
    assert config.activation_func is F.silu and config.gated_linear_unit
    assert (config.num_query_groups, config.softmax_scale, config.window_size) == (2, 0.5, (4, 0))
    assert (config.persist_layer_norm, config.bias_activation_fusion) == (False, False)
    assert config.init_method is torch.nn.init.xavier_uniform_


def test_nested_namespaces(read, tmp_path) -> None:
    """Callers that load the file themselves get the same."""
    flat = validate_yaml(read())
    nested = load_yaml(flat.yaml_cfg)
    assert nested.language_model.num_layers == 3
    config = core_transformer_config_from_yaml(nested)
    assert config.hidden_size == 64
    validate_yaml(nested)
    assert vars(nested) == vars(flat)


def test_same_as_the_command_line(read, check) -> None:
    sizes = "num_layers: 2\nhidden_size: 64\nnum_attention_heads: 4\nseq_length: 32\n"
    from_file = validate_args(
        read(
            sizes
            + "max_position_embeddings: 32\nmicro_batch_size: 2\ntrain_iters: 20\nlr: 1e-3\nfp16: true\n"
        )
    )
    from_line = check("--fp16")
    from_file.yaml_cfg = None
    assert vars(from_file) == vars(from_line)


def test_dataclass_from_attributes(read) -> None:
    config = core_config_from_args(validate_args(read()))
    assert (config.num_layers, config.hidden_dropout) == (3, 0.1)


def test_all_faults_at_once(read) -> None:
    text = FILE.replace("swiglu", "swiglue").replace("seq_length: 32", "seq_lenght: 32")
    text = text.replace("train_iters: 20", "train_iters: 2.5").replace("unfused", "unfusd")
    text = text.replace("bf16: true", "bf16: 3").replace("min_lr: 0", "min_lr: 5")
    with pytest.raises(ArgumentsError) as error:
        read(text)
    message = str(error.value)
    assert error.value.exit_status == 2
    for part in (
        "activation_func swiglue: in the YAML file: is not one of swiglu, squaredrelu, gelu",
        "seq_lenght: in the YAML file: no such argument; did you mean seq_length?",
        "2.5 is not a whole number",
        "did you mean unfused?",
        "3 is neither true nor false",
        "--min-lr 5: is above --lr 0.001",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("- a\n- b\n", "must hold keys and values"),
        ("a: [1\n", "cannot be read"),
        ("a: ${NOT_SET_ANYWHERE}\n", "environment variable NOT_SET_ANYWHERE is not set"),
        ("a: !!python/object/apply:os.system ['true']\n", "cannot be read"),
    ],
)
def test_unusable_file(text: str, part: str, read) -> None:
    with pytest.raises(ConfigError, match=part):
        read(text)


def test_missing_file(monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["pretrain", "--yaml-cfg", "/nowhere/x.yaml"])
    with pytest.raises(ConfigError, match="cannot be read"):
        parse_args()


def test_refused_and_missing_features(read) -> None:
    with pytest.raises(ArgumentsError, match=r"WORLD_SIZE 1: .* = 2 x 1 x 1 = 2 ranks"):
        validate_args(read(FILE.replace("tensor_model_parallel_size: 1", "tensor_model_parallel_size: 2")))
    with pytest.raises(ArgumentsError, match="--retro-num-neighbors 3: retrieval-enhanced"):
        validate_args(read(FILE.replace("retro_num_neighbors: 2", "retro_num_neighbors: 3")))
    with pytest.raises(ArgumentsError, match="--ckpt-format torch_dist"):
        validate_args(read(FILE + "ckpt_format: torch_dist\n"))
