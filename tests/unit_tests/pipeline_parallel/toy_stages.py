"""A chain of linear layers cut into pipeline stages, and the same chain in one process, in float64."""

import torch
import torch.distributed as dist

from megatron.core import parallel_state
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.linear import linear_with_grad_accumulation_and_async_allreduce
from megatron.core.transformer.transformer_config import TransformerConfig

HIDDEN, BATCH, LENGTH = 6, 2, 5


class Stage(torch.nn.Module):
    """tanh(x W^T + b) + x, drawn from the number of the (virtual) stage."""

    model_type = ModelType.encoder_or_decoder

    def __init__(self, config, stage):
        super().__init__()
        generator = torch.Generator().manual_seed(100 + stage)
        draw = {"generator": generator, "dtype": torch.float64}
        self.config, self.number = config, stage
        self.weight = torch.nn.Parameter(torch.randn(HIDDEN, HIDDEN, **draw) / 2)
        self.bias = torch.nn.Parameter(torch.randn(HIDDEN, **draw) / 2)
        self.scale = torch.nn.Parameter(torch.randn(HIDDEN, **draw))
        self.input_tensor = None

    def set_input_tensor(self, tensors):
        self.input_tensor = tensors[0]

    def forward(self, x):
        x = self.input_tensor if x is None else x
        normed = x * self.scale
        y = linear_with_grad_accumulation_and_async_allreduce(
            normed, self.weight, self.bias, False, False, False
        )
        return torch.tanh(y) + x


def make_batches(num_microbatches, variable=False):
    """Inputs [s, b, h]; with ``variable`` each micro-batch has a length of its own."""
    generator = torch.Generator().manual_seed(7)
    lengths = [LENGTH + (3 * k) % 4 if variable else LENGTH for k in range(num_microbatches)]
    return [torch.randn(s, BATCH, HIDDEN, generator=generator, dtype=torch.float64) for s in lengths]


def pair_loss(output, non_loss_data=False):
    if non_loss_data:
        return float(output.sum())
    loss = (output**2).mean()
    return loss, {"loss": float(loss.detach())}


def triple_loss(output):
    """(sum, count, report); the count differs between micro-batches."""
    count = torch.tensor(int((output[..., 0] > 0).sum()) + 1)
    loss = (output**2).sum()
    return loss, count, {"loss": (float(loss.detach()), int(count))}


LOSSES = {"pair": pair_loss, "triple": triple_loss}


def forward_func(loss):
    def step(data_iterator, model):
        output = model(next(data_iterator) if data_iterator is not None else None)
        return output, LOSSES[loss]

    return step


def make_config(**changes):
    values = {
        "num_layers": 1,
        "hidden_size": HIDDEN,
        "num_attention_heads": 1,
        "pipeline_dtype": torch.float64,
    }
    return TransformerConfig(**(values | changes))


def expected(num_stages, num_microbatches, loss="pair", variable=False, per_token=False):
    """Losses and gradients of the whole chain by plain autograd."""
    stages = [Stage(make_config(), stage) for stage in range(num_stages)]
    reports = []
    for x in make_batches(num_microbatches, variable):
        for stage in stages:
            x = stage(x)
        result = LOSSES[loss](x)
        value = result[0] if len(result) == 2 else result[0] / (1 if per_token else result[1])
        (value / (1 if per_token else num_microbatches)).backward()
        reports.append(result[-1])
    return reports, [{name: p.grad for name, p in stage.named_parameters()} for stage in stages]


def run_pipeline(
    schedule, num_chunks, num_microbatches, loss="pair", variable=False, deallocate=True, steps=1, **changes
):
    """One rank's part: reports, and the gradients of its chunks by number of virtual stage."""
    world = dist.get_world_size()
    virtual = num_chunks if schedule == "interleaved" else None
    parallel_state.initialize_model_parallel(1, world, create_gloo_process_groups=False)
    parallel_state.set_virtual_pipeline_model_parallel_world_size(virtual)
    rank = parallel_state.get_pipeline_model_parallel_rank()
    forward_keys = {k: changes.pop(k) for k in ("forward_only", "collect_non_loss_data") if k in changes}
    config = make_config(
        pipeline_model_parallel_size=world,
        virtual_pipeline_model_parallel_size=virtual,
        pipeline_schedule=schedule,
        deallocate_pipeline_outputs=deallocate,
        variable_seq_lengths=variable,
        **changes,
    )
    numbers = [chunk * world + rank for chunk in range(num_chunks)]
    models = [Stage(config, number) for number in numbers]
    seen_tokens = []
    config.finalize_model_grads_func = lambda chunks, tokens: seen_tokens.append(tokens)
    for _ in range(steps):
        for model in models:
            model.zero_grad()
        data = [iter(make_batches(num_microbatches, variable)) if n == 0 else None for n in numbers]
        with torch.set_grad_enabled(not forward_keys.get("forward_only", False)):
            reports = get_forward_backward_func()(
                forward_step_func=forward_func(loss),
                data_iterator=data if num_chunks > 1 else data[0],
                model=models if num_chunks > 1 else models[0],
                num_microbatches=num_microbatches,
                seq_length=LENGTH,
                micro_batch_size=BATCH,
                **forward_keys,
            )
    grads = {
        number: {name: p.grad for name, p in model.named_parameters()}
        for number, model in zip(numbers, models, strict=True)
    }
    return reports, grads, seen_tokens
