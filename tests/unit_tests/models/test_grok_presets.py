"""Both presets of Grok-1, from the command line to logits and gradients against float64."""

import sys

import pytest
import torch

from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.training.arguments import core_transformer_config_from_args, parse_args, validate_args
from megatron.training.model_setup import layer_spec_from_args
from tests.unit_tests.models.grok_reference import Shape
from tests.unit_tests.models.test_grok import FFN, GROUPS, HEADS, HIDDEN, LAYERS, LENGTH, VOCAB, compare

RUN = "--micro-batch-size 2 --train-iters 1 --lr 1e-3"
SMALL = (
    f"{RUN} --num-layers {LAYERS} --hidden-size {HIDDEN} --ffn-hidden-size {FFN} "
    f"--num-attention-heads {HEADS} --num-query-groups {GROUPS} --seq-length {LENGTH} "
    f"--max-position-embeddings {LENGTH} --transformer-impl local"
)
# The mixture of the published descriptions; factors at this width.
SHAPES = {
    "modellink": Shape(LAYERS, HEADS, GROUPS, "silu", True, HIDDEN**0.5, 3**-0.5, top_k=2),
    "grok1": Shape(
        LAYERS, HEADS, GROUPS, "gelu_tanh", True, HIDDEN**0.5, 3**-0.5, 30.0, top_k=2, softmax_first=True
    ),
}


@pytest.fixture
def arguments(monkeypatch):
    for variable in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)

    def complete(words):
        monkeypatch.setattr(sys, "argv", ["pretrain", *words.split()])
        return validate_args(parse_args())

    return complete


def build(args):
    """A model whose norms do not all weigh 1, and whose attention scores go well beyond the cap."""
    settings = core_transformer_config_from_args(args)
    model_parallel_cuda_manual_seed(8)
    model = GPTModel(
        settings,
        layer_spec_from_args(args, settings),
        VOCAB,
        LENGTH,
        position_embedding_type=args.position_embedding_type,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
            elif "linear_qkv" in name:
                parameter.normal_(std=1.0)
            elif "embedding" not in name:
                parameter.normal_(std=0.3)
    return model


@pytest.mark.parametrize("dispatcher", ["allgather", "alltoall", "alltoall_seq"])
@pytest.mark.parametrize("preset", SHAPES)
def test_presets_equal_float64(preset, dispatcher, arguments):
    # The balancing loss would add to the gradients; 0 is given, so the preset leaves it.
    words = f"--moe-token-dispatcher-type {dispatcher} --moe-aux-loss-coeff 0"
    model = build(arguments(f"--grok-preset {preset} {words} {SMALL}"))
    assert ("output_layer.weight" in dict(model.named_parameters())) == (preset == "modellink")
    compare(model, SHAPES[preset], 2e-5)


PUBLISHED = {
    "num_layers": {"modellink": 8, "grok1": 64},
    "hidden_size": 6144,
    "ffn_hidden_size": 32768,
    "num_attention_heads": 48,
    "num_query_groups": 8,
    "kv_channels": 128,
    "max_position_embeddings": 8192,
    "num_experts": 8,
    "moe_router_topk": 2,
    "embedding_multiplier_scale": 78.38367176906169,
    "output_multiplier_scale": 0.5773502691896257,
    "norm_epsilon": 1e-5,
    "rotary_base": 10000,
    "untie_embeddings_and_output_weights": {"modellink": True, "grok1": False},
    "swiglu": {"modellink": True, "grok1": False},
    "moe_aux_loss_coeff": {"modellink": 1e-2, "grok1": 0.0},
}


@pytest.mark.parametrize("preset", SHAPES)
def test_sizes_are_the_published_ones(preset, arguments, capsys):
    args = arguments(f"--grok-preset {preset} {RUN}")
    for name, value in PUBLISHED.items():
        wanted = value[preset] if isinstance(value, dict) else value
        assert getattr(args, name) == wanted, name
    output = capsys.readouterr().out.splitlines()
    (line,) = [line for line in output if line.startswith("notice: --grok-preset")]
    assert "--hidden-size 6144" in line and "moe-router-topk" not in line


@pytest.mark.parametrize("preset", SHAPES)
def test_given_flags_win(preset, arguments):
    """Also those that are given their default value, and those that name the same choice otherwise."""
    words = "--geglu --init-method-std 0.02 --embedding-multiplier-scale 1.0 --attention-dropout 0.1"
    args = arguments(f"--grok-preset {preset} {words} {SMALL} --position-embedding-type none")
    assert (args.geglu, args.gelu_tanh, args.swiglu) == (True, False, False)
    assert (args.init_method_std, args.embedding_multiplier_scale, args.attention_dropout) == (0.02, 1.0, 0.1)
    assert (args.num_layers, args.position_embedding_type) == (LAYERS, "none")


def test_without_a_preset_nothing_changes(arguments):
    args = arguments(SMALL)
    assert not args.post_norm and args.num_experts is None and args.output_multiplier_scale is None
