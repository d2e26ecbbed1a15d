"""Two small GPTs, whole and split, and what the split one should hold: helpers that run on the ranks."""

import torch
import torch.nn.functional as F

from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.initial_weights import own_slice
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig

VOCABULARY, SEQUENCE, BATCH, SEED = 48, 16, 2, 21

COMMON = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 8,
    "init_method_std": 0.2,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "params_dtype": torch.float64,
}
# name -> (config fields, model arguments)
MODELS = {
    "gpt": ({}, {"position_embedding_type": "learned_absolute", "share_embeddings_and_output_weights": True}),
    "llama": (
        {
            "num_query_groups": 4,
            "normalization": "RMSNorm",
            "gated_linear_unit": True,
            "activation_func": F.silu,
            "add_bias_linear": False,
            "qk_layernorm": True,
            "ffn_hidden_size": 48,
        },
        {"position_embedding_type": "rope"},
    ),
}


def batch():
    generator = torch.Generator().manual_seed(3)
    tokens, labels = torch.randint(VOCABULARY, (2, BATCH, SEQUENCE), generator=generator)
    return tokens, torch.arange(SEQUENCE).expand(BATCH, -1), labels


def build(name, te_names=False, seed=SEED, stage=None, pipeline=False, **fields):
    """The model of this rank; ``stage`` (first, last) says which ends of the pipeline it holds."""
    config_fields, arguments = MODELS[name]
    config = TransformerConfig(**COMMON | config_fields | fields)
    first, last = (True, True) if stage is None else stage
    rank = parallel_state.get_pipeline_model_parallel_rank() if pipeline else 0
    model_parallel_cuda_manual_seed(seed + 100 * rank, weight_seed=seed)
    return GPTModel(
        config,
        get_gpt_decoder_block_spec(config, te_names),
        VOCABULARY,
        SEQUENCE,
        pre_process=first,
        post_process=last,
        **arguments,
    )


def loss_of(model):
    tokens, positions, labels = batch()
    return model(tokens, positions, None, labels=labels)


def train_step(model):
    """Loss per token [b, s], and the gradients by name, complete on every rank that has the parameter."""
    loss = loss_of(model)
    loss.mean().backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        gradients[name] = parameter.grad.clone()
        if getattr(parameter, "sequence_parallel", False):
            group = parallel_state.get_tensor_model_parallel_group()
            torch.distributed.all_reduce(gradients[name], group=group)
    return loss.detach(), gradients


def cut_like(whole, parameter):
    """This rank's slice of a tensor that belongs to the whole ``parameter``."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return whole
    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    return own_slice(whole, parameter.partition_dim, parameter.partition_stride, rank, size)
