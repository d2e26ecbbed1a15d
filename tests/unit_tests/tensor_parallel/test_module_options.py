"""Modules that scripts build themselves, with every option: two tensor-parallel ranks give what one gives."""

import pytest
import torch
import torch.nn.functional as F
from option_world import BASE, CHANNELS, HIDDEN, SEQUENCE, WHOLE, WIDE, B, S, World, draw, random
from split_models import cut_like

from megatron.core.errors import ConfigError, NotBuiltYetError, UsageError
from megatron.core.models.common.embeddings import RotaryEmbedding
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_mlp_module_spec
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from tests.distributed.pool import run_ranks


def column(config, **options):
    options = {"init_method": draw, **options}
    return ColumnParallelLinear(HIDDEN, WIDE, config=config, **options)


def row(config, **options):
    given = {"init_method": draw, "bias": True, "input_is_parallel": True, "skip_bias_add": False}
    return RowParallelLinear(WIDE, HIDDEN, config=config, **given | options)


def attention(config, mask_type=AttnMaskType.causal):
    submodules = get_gpt_layer_local_spec(qk_layernorm=True).submodules.self_attention.submodules
    return SelfAttention(config, submodules, 1, mask_type)


def layer(config, **options):
    return TransformerLayer(config, get_gpt_layer_local_spec().submodules, 1, **options)


def block(config, received=False, **options):
    model = TransformerBlock(config, get_gpt_layer_local_spec(), **options)
    if received:
        forward = model.forward

        def take(x, *arguments, **more):
            model.set_input_tensor(x)
            return forward(None, *arguments, **more)

        model.forward = take
    return model


def mlp(config, **options):
    return MLP(config, get_mlp_module_spec(use_te=False).submodules, **options)


def added(result):
    """A layer's (output, bias) as one tensor; what is handed out beside a layer's output is dropped."""
    if not isinstance(result, tuple):
        return result
    output, bias = result
    return output if bias is None else output + bias


HIDDEN_KEYS = torch.zeros(B, 1, S, S, dtype=torch.bool)
HIDDEN_KEYS[1, :, :, -3:] = True
ARBITRARY = torch.rand(B, 1, S, S, generator=torch.Generator().manual_seed(2)) > 0.6
ARBITRARY[..., 0] = False
ANGLES = RotaryEmbedding(HIDDEN // 4, 0.5)
MASK = {"attention_mask": HIDDEN_KEYS}
# name -> (module, what input and output are with several ranks, further arguments of forward, config fields)
# An activation between layers is the whole sequence, or a part of it under sequence parallelism.
CASES = {
    "column": (column, SEQUENCE, CHANNELS, {}, {}),
    "column, no bias": (lambda c: column(c, bias=False), SEQUENCE, CHANNELS, {}, {}),
    "column, bias apart": (lambda c: column(c, skip_bias_add=True), SEQUENCE, CHANNELS, {}, {}),
    "column, gathered": (lambda c: column(c, gather_output=True), SEQUENCE, WHOLE, {}, {}),
    "column, gathered at run time": (column, SEQUENCE, WHOLE, {"runtime_gather_output": True}, {}),
    "column, left split at run time": (
        lambda c: column(c, gather_output=True),
        SEQUENCE,
        CHANNELS,
        {"runtime_gather_output": False},
        {},
    ),
    "column of two parts, gathered": (
        lambda c: column(c, stride=2, gather_output=True),
        SEQUENCE,
        WHOLE,
        {},
        {},
    ),
    "column of three parts, gathered": (
        lambda c: column(c, stride=3, gather_output=True),
        SEQUENCE,
        WHOLE,
        {},
        {},
    ),
    "column, master kept": (
        lambda c: column(c, keep_master_weight_for_test=True),
        SEQUENCE,
        CHANNELS,
        {},
        {"use_cpu_initialization": True},
    ),
    "column, buffer named": (lambda c: column(c, tp_comm_buffer_name="qkv"), SEQUENCE, CHANNELS, {}, {}),
    "row": (row, CHANNELS, SEQUENCE, {}, {}),
    "row, no bias": (lambda c: row(c, bias=False), CHANNELS, SEQUENCE, {}, {}),
    "row, bias apart": (lambda c: row(c, skip_bias_add=True), CHANNELS, SEQUENCE, {}, {}),
    "mlp": (mlp, SEQUENCE, SEQUENCE, {}, {}),
    "mlp, another input": (lambda c: mlp(c, input_size=WIDE), SEQUENCE, SEQUENCE, {}, {"tests_width": WIDE}),
    "mlp, tokens scaled": (mlp, SEQUENCE, SEQUENCE, {"per_token_scale": random(6, S, B)}, {}),
    "mlp, gated": (
        mlp,
        SEQUENCE,
        SEQUENCE,
        {},
        {"gated_linear_unit": True, "activation_func": F.silu, "ffn_hidden_size": 20},
    ),
    "attention": (attention, SEQUENCE, SEQUENCE, {"attention_mask": None}, {}),
    "attention, padded": (attention, SEQUENCE, SEQUENCE, MASK, {}),
    "attention, arbitrary": (
        lambda c: attention(c, AttnMaskType.arbitrary),
        SEQUENCE,
        SEQUENCE,
        {"attention_mask": ARBITRARY},
        {},
    ),
    "attention, unmasked": (
        lambda c: attention(c, AttnMaskType.no_mask),
        SEQUENCE,
        SEQUENCE,
        {"attention_mask": None},
        {"softmax_scale": 0.3},
    ),
    "attention, angles": (
        attention,
        SEQUENCE,
        SEQUENCE,
        {"attention_mask": None, "rotary_pos_emb": ANGLES(S)},
        {},
    ),
    "attention, a pair of angles": (
        attention,
        SEQUENCE,
        SEQUENCE,
        {"attention_mask": None, "rotary_pos_emb": (ANGLES(S), ANGLES(S, 3))},
        {},
    ),
    "attention, tables": (
        attention,
        SEQUENCE,
        SEQUENCE,
        {"attention_mask": None}
        | dict(zip(("rotary_pos_cos", "rotary_pos_sin"), ANGLES.get_cos_sin(S), strict=True)),
        {},
    ),
    "layer": (layer, SEQUENCE, SEQUENCE, {"attention_mask": None}, {}),
    "layer without dropout": (
        lambda c: layer(c, hidden_dropout=0.0),
        SEQUENCE,
        SEQUENCE,
        MASK,
        {"hidden_dropout": 0.5},
    ),
    "block": (block, SEQUENCE, SEQUENCE, MASK, {}),
    "block without a last norm": (lambda c: block(c, post_layer_norm=False), SEQUENCE, SEQUENCE, MASK, {}),
    "block of a stage inside": (
        lambda c: block(c, True, pre_process=False, post_process=False),
        SEQUENCE,
        SEQUENCE,
        MASK,
        {},
    ),
    "block, recomputed": (
        block,
        SEQUENCE,
        SEQUENCE,
        MASK,
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 2},
    ),
}
# With an input that is whole on every rank, sequence parallelism has no say.
PLAIN_CASES = {
    "row, whole input": (lambda c: row(c, input_is_parallel=False), WHOLE, WHOLE, {}, {}),
    "row of two parts, whole input": (
        lambda c: row(c, input_is_parallel=False, stride=2),
        WHOLE,
        WHOLE,
        {},
        {},
    ),
    "row of three parts, whole input": (
        lambda c: row(c, input_is_parallel=False, stride=3),
        WHOLE,
        WHOLE,
        {},
        {},
    ),
    "column of an expert": (lambda c: column(c, is_expert=True), WHOLE, CHANNELS, {}, {}),
    "row of an expert": (lambda c: row(c, is_expert=True), CHANNELS, WHOLE, {}, {}),
    "mlp of an expert": (
        lambda c: mlp(c, is_expert=True),
        WHOLE,
        WHOLE,
        {},
        {"moe_ffn_hidden_size": 12},
    ),
    "recomputed from pieces": (
        block,
        WHOLE,
        WHOLE,
        MASK,
        {
            "recompute_granularity": "full",
            "recompute_method": "block",
            "recompute_num_layers": 1,
            "distribute_saved_activations": True,
        },
    ),
}


def run(world, case):
    make, of_input, of_output, arguments, fields = case
    fields = dict(fields)
    width = fields.pop("tests_width", None)
    module = make(world.config(**fields))
    with torch.no_grad():
        for number, (name, parameter) in enumerate(module.named_parameters()):
            if name.endswith("bias") or "norm" in name:
                whole_shape = list(parameter.shape)
                if getattr(parameter, "tensor_model_parallel", False):
                    whole_shape[0] *= world.size
                parameter.copy_(cut_like(random(50 + number, *whole_shape), parameter))
    is_row = isinstance(module, RowParallelLinear)
    whole = random(1, S, B, WIDE if is_row else width or HIDDEN)
    x = world.part(whole, of_input).clone().requires_grad_()
    out = added(module(x, **arguments))
    wanted = world.part(
        random(2, S, B, out.shape[-1] * (world.size if of_output == CHANNELS else 1)), of_output
    )
    out.backward(wanted)
    return (
        module,
        world.joined(out.detach(), of_output),
        world.joined(x.grad, of_input),
        world.gradients(module),
    )


def check_equal(names, cases, sequence_parallel):
    whole_world = World(1, False)
    wholes = {name: run(whole_world, cases[name]) for name in names}
    world = World(torch.distributed.get_world_size(), sequence_parallel)
    problems = []
    for name in names:
        whole, whole_out, whole_input_gradient, whole_gradients = wholes[name]
        weights = dict(whole.named_parameters())
        try:
            module, out, input_gradient, gradients = run(world, cases[name])
            torch.testing.assert_close(out, whole_out, msg=lambda text: f"output: {text}")
            torch.testing.assert_close(
                input_gradient, whole_input_gradient, msg=lambda text: f"gradient of the input: {text}"
            )
            for key, parameter in module.named_parameters():
                assert torch.equal(parameter, cut_like(weights[key], parameter)), key
                torch.testing.assert_close(
                    gradients[key],
                    cut_like(whole_gradients[key], parameter),
                    msg=lambda text, key=key: f"{key}: {text}",
                )
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            problems.append(f"{name}: {type(error).__name__}: {error}")
    return problems


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_two_ranks_give_what_one_gives(sequence_parallel):
    cases = CASES if sequence_parallel else CASES | PLAIN_CASES
    for problems in run_ranks(2, check_all, list(cases), sequence_parallel):
        assert not problems, "\n".join(problems)


def check_all(names, sequence_parallel):
    return check_equal(names, CASES | PLAIN_CASES, sequence_parallel)


def check_refusals():
    world = World(2, True)
    refused = {
        "input_is_parallel": (UsageError, lambda: row(world.config(), input_is_parallel=False)),
        "output_size": (
            ConfigError,
            lambda: ColumnParallelLinear(4, 5, config=world.config(), init_method=draw),
        ),
        "input_size": (ConfigError, lambda: row(world.config(num_query_groups=1))),
        "num_embeddings": (
            ConfigError,
            lambda: VocabParallelEmbedding(5, 4, init_method=draw, config=world.config()),
        ),
        "moe_ffn_hidden_size": (ConfigError, lambda: mlp(world.config(), is_expert=True)),
        "distribute_saved_activations": (
            ConfigError,
            lambda: world.config(
                distribute_saved_activations=True,
                recompute_granularity="full",
                recompute_method="block",
                recompute_num_layers=1,
            ),
        ),
    }
    refused["num_query_groups"] = refused.pop("input_size")
    for word, (error, call) in refused.items():
        with pytest.raises(error, match=word):
            call()
    x = random(1, S // 2, B, HIDDEN)
    for word, arguments in {
        "key_value_states": {"key_value_states": x},
        "bias on attention": {"attention_bias": random(1, 1, 4, S, S)},
        "key/value cache": {"sequence_len_offset": 3},
        "rotary_pos_emb": {
            "rotary_pos_emb": ANGLES(S),
            "rotary_pos_cos": ANGLES(S),
            "rotary_pos_sin": ANGLES(S),
        },
    }.items():
        with pytest.raises((UsageError, NotBuiltYetError), match=word):
            attention(world.config())(x, None, **arguments)
    return True


def test_contradictory_layer_options_are_refused():
    assert run_ranks(2, check_refusals) == [True, True]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("fp8", "hybrid"),
        ("fp8_param", True),
        ("fp8_dot_product_attention", True),
        ("fp8_multi_head_attention", True),
        ("cpu_offloading", True),
        ("enable_cuda_graph", True),
        ("external_cuda_graph", True),
        ("flash_decode", True),
        ("heterogeneous_block_specs", True),
    ],
)
def test_what_is_not_built_is_refused_by_the_config(field, value):
    with pytest.raises(NotBuiltYetError, match=f"{field}="):
        TransformerConfig(**BASE, **{field: value})
