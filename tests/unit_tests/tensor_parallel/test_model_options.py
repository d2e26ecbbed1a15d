"""Every option of a GPT that a script may set: two tensor-parallel ranks give what one gives."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from split_models import cut_like

from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
)
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import TransformerConfig
from tests.distributed.pool import run_ranks

VOCABULARY, SEQUENCE, BATCH, HIDDEN = 24, 8, 2, 16
BASE = {
    "num_layers": 2,
    "hidden_size": HIDDEN,
    "num_attention_heads": 4,
    "init_method_std": 0.3,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "params_dtype": torch.float64,
}
FULL = {"recompute_granularity": "full", "recompute_num_layers": 1}
GATED = {"gated_linear_unit": True, "activation_func": F.silu, "add_bias_linear": False}
ROPE = {"position_embedding_type": "rope"}


def uniform(t):
    return torch.nn.init.uniform_(t, -0.4, 0.6)


def squared_relu(x):
    return torch.relu(x) ** 2


def decoder_block(config, **arguments):
    return get_gpt_decoder_block_spec(config, False, **arguments)


# name -> fields of the config
CONFIGS = {
    "plain": {},
    "another activation": {"activation_func": squared_relu},
    "a lambda as activation": {"activation_func": lambda x: torch.sin(x) + x},
    "gate": GATED,
    "gate with biases": {**GATED, "add_bias_linear": True},
    "gate of another activation": {**GATED, "activation_func": torch.tanh, "ffn_hidden_size": 12},
    "gate of gelu": {**GATED, "activation_func": F.gelu},
    "gate last": {**GATED, "glu_gate_last": True},
    "bias of the projection only": {"add_bias_linear": False, "add_qkv_bias": True},
    "two query groups": {"num_query_groups": 2},
    "narrow heads": {"kv_channels": 3, "num_query_groups": 2},
    "wide heads": {"kv_channels": 7},
    "layer scaling": {"apply_query_key_layer_scaling": True, "attention_backend": AttnBackend.unfused},
    "softmax scale": {"softmax_scale": 0.7},
    "softmax scale in steps": {"softmax_scale": 0.7, "attention_backend": AttnBackend.local},
    "softmax in the type of scores": {
        "attention_softmax_in_fp32": False,
        "attention_backend": AttnBackend.unfused,
        "masked_softmax_fusion": True,
    },
    "window": {"window_size": (3, 0)},
    "batch first": {"attention_layout": "BSH"},
    "norm around 1": {"layernorm_zero_centered_gamma": True, "layernorm_epsilon": 0.1},
    "rms norm around 1": {"layernorm_zero_centered_gamma": True, "normalization": "RMSNorm"},
    "norms of heads": {"qk_layernorm": True, "test_mode": True},
    "residual after the norm": {"apply_residual_connection_post_layernorm": True},
    "fused kernels": {
        "bias_activation_fusion": True,
        "bias_dropout_fusion": True,
        "persist_layer_norm": True,
        "memory_efficient_layer_norm": True,
        "apply_rope_fusion": True,
        "cross_entropy_loss_fusion": True,
        "gradient_accumulation_fusion": True,
    },
    "own initialisers": {"init_method": uniform, "output_layer_init_method": partial(uniform)},
    "drawn on the CPU": {"use_cpu_initialization": True},
    "embedding part not cloned": {"clone_scatter_output_in_embedding": False},
    "uniform recomputation": {**FULL, "recompute_method": "uniform"},
    "block recomputation": {**FULL, "recompute_method": "block"},
    "recomputed attention": {"recompute_granularity": "selective"},
    "recomputed parts": {
        "recompute_granularity": "selective",
        "recompute_modules": ["core_attn", "mlp", "layernorm"],
    },
    "overlapped matmuls": {"tp_comm_overlap": True, "tp_comm_chunks": 2},
    "old and inert switches": {
        "async_tensor_model_parallel_allreduce": True,
        "deterministic_mode": True,
        "disable_parameter_transpose_cache": True,
        "use_te_rng_tracker": True,
        "calculate_per_token_loss": True,
        "barrier_with_L1_time": False,
        "disable_bf16_reduced_precision_matmul": True,
    },
}
# name -> (fields of the config, arguments of the model)
MODELS = {
    "tied": ({}, {"share_embeddings_and_output_weights": True}),
    "whole logits": ({}, {"parallel_output": False}),
    "tied, whole logits": ({}, {"parallel_output": False, "share_embeddings_and_output_weights": True}),
    "loss in the type of logits": ({}, {"fp16_lm_cross_entropy": True}),
    "no positions": ({}, {"position_embedding_type": "none"}),
    "rotary": ({}, ROPE),
    "rotary, half of the channels": ({}, {**ROPE, "rotary_percent": 0.5, "rotary_base": 100}),
    "rotary, interleaved": ({"rotary_interleaved": True}, {**ROPE, "rotary_percent": 0.5}),
    "rotary, scaled": ({}, {**ROPE, "rope_scaling": True, "rope_scaling_factor": 4.0}),
    "rotary, interpolated": ({}, {**ROPE, "seq_len_interpolation_factor": 2.0}),
    "embedding not split": ({}, {"scatter_embedding_sequence_parallel": False}),
    "rotary, embedding not split": ({}, {**ROPE, "scatter_embedding_sequence_parallel": False}),
    "spec of a layer": ({}, {"transformer_layer_spec": lambda config: get_gpt_layer_local_spec()}),
    "names of TransformerEngine": (
        {"qk_layernorm": True},
        {
            "transformer_layer_spec": lambda config: get_gpt_layer_with_transformer_engine_spec(
                qk_layernorm=True
            )
        },
    ),
    "heads normed without parameters": (
        {},
        {"transformer_layer_spec": partial(decoder_block, qk_l2_norm=True)},
    ),
}
# name -> (arguments of the model, arguments of forward by name of a maker below)
FORWARDS = {
    "logits": ({}, ["no labels"]),
    "logits asked for whole": ({}, ["no labels", "whole"]),
    "logits asked for in parts": ({"parallel_output": False}, ["no labels", "parts"]),
    "loss of logits asked for whole": ({}, ["whole"]),
    "mask of padding": ({}, ["mask"]),
    "mask of padding, rotary": (ROPE, ["mask"]),
    "decoder input": ({}, ["decoder input"]),
    "decoder input, rotary": (ROPE, ["decoder input"]),
    "packed": ({}, ["packed"]),
    "packed, rotary": (ROPE, ["packed"]),
    "mask of the loss, further arguments": ({}, ["loss mask", "further"]),
}
CASES = (
    {f"config: {name}": (fields, {}, []) for name, fields in CONFIGS.items()}
    | {f"model: {name}": (*both, []) for name, both in MODELS.items()}
    | {f"forward: {name}": ({}, *both) for name, both in FORWARDS.items()}
)


def build(fields, arguments, size, sequence_parallel):
    config = TransformerConfig(
        **BASE | fields, tensor_model_parallel_size=size, sequence_parallel=sequence_parallel
    )
    model_parallel_cuda_manual_seed(11)
    arguments = {"transformer_layer_spec": decoder_block, **arguments}
    spec = arguments.pop("transformer_layer_spec")(config)
    return GPTModel(config, spec, VOCABULARY, SEQUENCE, **arguments)


def random(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def make_inputs(kinds, sequence_parallel):
    """Arguments of forward; the last is what stands for the embedding's output, or None."""
    rows = 1 if "packed" in kinds else BATCH
    generator = torch.Generator().manual_seed(3)
    tokens, labels = torch.randint(VOCABULARY, (2, rows, SEQUENCE), generator=generator)
    given = {
        "input_ids": tokens,
        "position_ids": torch.arange(SEQUENCE).expand(rows, -1),
        "attention_mask": None,
        "labels": None if "no labels" in kinds else labels,
    }
    if "whole" in kinds or "parts" in kinds:
        given["runtime_gather_output"] = "whole" in kinds
    if "mask" in kinds:
        # The last two keys of the second row are padding.
        given["attention_mask"] = torch.zeros(rows, 1, SEQUENCE, SEQUENCE, dtype=torch.bool)
        given["attention_mask"][1, :, :, -2:] = True
    if "packed" in kinds:
        starts = torch.tensor([0, 3, SEQUENCE], dtype=torch.int32)
        given["packed_seq_params"] = PackedSeqParams("thd", starts, starts)
        given["position_ids"] = torch.tensor([[*range(3), *range(SEQUENCE - 3)]])
    if "loss mask" in kinds:
        given["loss_mask"] = torch.ones(rows, SEQUENCE)
    if "further" in kinds:
        given["extra_block_kwargs"] = {"context": None}
    if "decoder input" in kinds:
        whole = random(5, SEQUENCE, rows, HIDDEN)
        if sequence_parallel:
            rank = parallel_state.get_tensor_model_parallel_rank()
            whole = whole.chunk(parallel_state.get_tensor_model_parallel_world_size())[rank]
        given["decoder_input"] = whole.clone().requires_grad_()
    return given


def run(model, kinds):
    """Output, whole on every rank, and gradients by name, complete wherever the parameter is."""
    sequence_parallel = model.config.sequence_parallel
    given = make_inputs(kinds, sequence_parallel)
    out = model(**given)
    whole_logits = given.get("runtime_gather_output", model.output_layer.gather_output is not False)
    if given["labels"] is None and not whole_logits:
        out = gather_from_tensor_model_parallel_region(out)
    (out * random(9, *out.shape)).sum().backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        # Of unused tables there is none.
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        if getattr(parameter, "sequence_parallel", False):
            torch.distributed.all_reduce(gradient, group=parallel_state.get_tensor_model_parallel_group())
        gradients[name] = gradient
    if "decoder_input" in given:
        gradient = given["decoder_input"].grad
        gathers = sequence_parallel
        gradients["decoder_input"] = gather_from_sequence_parallel_region(gradient) if gathers else gradient
    return out.detach(), gradients


def compare(names, sequence_parallel):
    parallel_state.initialize_model_parallel(1)
    wholes = {}
    for name in names:
        fields, arguments, kinds = CASES[name]
        model = build(fields, arguments, 1, False)
        wholes[name] = (dict(model.named_parameters()), *run(model, kinds))
    parallel_state.destroy_model_parallel()
    size = torch.distributed.get_world_size()
    parallel_state.initialize_model_parallel(size)
    problems = []
    for name in names:
        fields, arguments, kinds = CASES[name]
        weights, whole_out, whole_gradients = wholes[name]
        try:
            model = build(fields, arguments, size, sequence_parallel)
            for key, parameter in model.named_parameters():
                assert torch.equal(parameter, cut_like(weights[key], parameter)), key
            out, gradients = run(model, kinds)
            torch.testing.assert_close(out, whole_out, msg=lambda text: f"output: {text}")
            assert gradients.keys() == whole_gradients.keys()
            parameters = dict(model.named_parameters())
            for key, gradient in gradients.items():
                expected = whole_gradients[key]
                if key in parameters:
                    expected = cut_like(expected, parameters[key])
                torch.testing.assert_close(gradient, expected, msg=lambda text, key=key: f"{key}: {text}")
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            problems.append(f"{name}: {type(error).__name__}: {error}")
    return problems


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("part", ["config", "model", "forward"])
def test_two_ranks_give_what_one_gives(part, sequence_parallel):
    names = [name for name in CASES if name.startswith(part)]
    for problems in run_ranks(2, compare, names, sequence_parallel):
        assert not problems, "\n".join(problems)
