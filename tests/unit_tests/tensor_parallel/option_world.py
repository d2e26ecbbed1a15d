"""One config and one set of activations for modules on one rank and on several."""

import torch

from megatron.core import parallel_state
from megatron.core.tensor_parallel import mappings
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig

WHOLE, SEQUENCE, CHANNELS = "whole", "sequence", "channels"
S, B, HIDDEN, WIDE = 8, 2, 16, 24
BASE = {
    "num_layers": 2,
    "hidden_size": HIDDEN,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "params_dtype": torch.float64,
}


def random(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def draw(t):
    return torch.nn.init.normal_(t, 0.1, 0.5)


class World:
    """The config of a case on these ranks, and the parts of tensors that a rank has."""

    def __init__(self, size, sequence_parallel):
        if parallel_state.is_initialized():
            parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(size)
        self.size, self.sp = size, sequence_parallel
        self.rank = parallel_state.get_tensor_model_parallel_rank()

    def config(self, **fields):
        model_parallel_cuda_manual_seed(13)
        return TransformerConfig(
            **BASE | fields, tensor_model_parallel_size=self.size, sequence_parallel=self.sp
        )

    def part(self, whole, kind):
        if kind == CHANNELS:
            return whole.chunk(self.size, -1)[self.rank]
        return whole.chunk(self.size)[self.rank] if kind == SEQUENCE and self.sp else whole

    def joined(self, part, kind):
        if kind == CHANNELS:
            return mappings.gather_from_tensor_model_parallel_region(part)
        is_part = kind == SEQUENCE and self.sp
        return mappings.gather_from_sequence_parallel_region(part) if is_part else part

    def gradients(self, module):
        found = {}
        for name, parameter in module.named_parameters():
            found[name] = parameter.grad.clone()
            if getattr(parameter, "sequence_parallel", False):
                torch.distributed.all_reduce(
                    found[name], group=parallel_state.get_tensor_model_parallel_group()
                )
        return found
