"""A small GPT cut into stages gives the loss and every gradient of the whole model."""

import pytest
import torch
import torch.distributed as dist

from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig
from tests.distributed.pool import run_ranks

VOCABULARY, LENGTH, BATCH, MICROBATCHES = 32, 8, 2, 4
TIED = {"share_embeddings_and_output_weights": True, "position_embedding_type": "learned_absolute"}
ROTARY = {"share_embeddings_and_output_weights": False, "position_embedding_type": "rope"}


def make_config(world, chunks, schedule, **changes):
    values = {
        "num_layers": 4,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "pipeline_dtype": torch.float32,
        "pipeline_model_parallel_size": world,
        "virtual_pipeline_model_parallel_size": chunks if chunks > 1 else None,
        "pipeline_schedule": schedule,
        "deallocate_pipeline_outputs": True,
        "overlap_p2p_comm": chunks > 1,
        "batch_p2p_comm": chunks == 1,
    }
    return TransformerConfig(**(values | changes))


def batches():
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, VOCABULARY, (MICROBATCHES, BATCH, LENGTH + 1), generator=generator)
    return iter([(t[:, :-1], t[:, 1:]) for t in tokens])


def forward_step(data_iterator, model):
    tokens, labels = next(data_iterator)
    positions = torch.arange(LENGTH).expand_as(tokens)
    output = model(tokens, positions, None, labels=labels)
    return output, lambda loss: (loss.mean(), {"loss": float(loss.detach().mean())})


def run_gpt(model_keys, chunks=1, schedule=None, scale=1.0, pp=None, ddp=None, by_call=False, **changes):
    """Reports, this rank's gradients by their names in the whole model, and what its chunks consist of."""
    world = pp or dist.get_world_size()
    parallel_state.initialize_model_parallel(
        1, world, chunks if chunks > 1 else None, create_gloo_process_groups=False
    )
    tensor_parallel.model_parallel_cuda_manual_seed(11)
    config = make_config(world, chunks, schedule, **changes)
    models = []
    for chunk in range(chunks):
        if chunks > 1:
            parallel_state.set_virtual_pipeline_model_parallel_rank(chunk)
        model = GPTModel(
            config,
            get_gpt_layer_local_spec(),
            VOCABULARY,
            LENGTH,
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
            **model_keys,
        )
        models.append(DistributedDataParallel(config, DistributedDataParallelConfig(**(ddp or {})), model))
    config.finalize_model_grads_func = finalize_model_grads
    config.no_sync_func = [model.no_sync for model in models]
    if by_call:
        config.grad_sync_func = [model.start_grad_sync for model in models]
    if scale != 1.0:
        config.grad_scale_func = lambda loss: loss * scale
    reports = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[batches() for _ in models],
        model=models,
        num_microbatches=MICROBATCHES,
        seq_length=LENGTH,
        micro_batch_size=BATCH,
    )
    return reports, named_gradients(models), shapes_of(models)


def named_gradients(models):
    grads = {}
    for model in models:
        inner = model.module
        first = inner.decoder.layers[0].layer_number - 1 if len(inner.decoder.layers) else 0
        for name, param in inner.named_parameters():
            parts = name.split(".")
            if parts[:2] == ["decoder", "layers"]:
                parts[2] = str(int(parts[2]) + first)
            if getattr(param, "shared", False):
                parts = ["copy of the word embedding"]
            grads[".".join(parts)] = param.main_grad.clone()
    return grads


def shapes_of(models):
    """(layers, has a final norm, has an embedding, has an output layer) of each chunk."""
    return [
        (
            len(m.module.decoder.layers),
            m.module.decoder.final_layernorm is not None,
            hasattr(m.module, "embedding"),
            hasattr(m.module, "output_layer"),
        )
        for m in models
    ]


def check(results, model_keys, scale=1.0):
    ((reports, wanted, _),) = run_ranks(1, run_gpt, model_keys, scale=scale)
    assert [report["loss"] for report in results[-1][0]] == pytest.approx(
        [report["loss"] for report in reports], rel=1e-6
    )
    found = {}
    for _, grads, _ in results:
        assert not found.keys() & grads.keys()
        found |= grads
    if model_keys["share_embeddings_and_output_weights"] and len(results) > 1:
        assert torch.equal(found.pop("copy of the word embedding"), found["embedding.word_embeddings.weight"])
    assert found.keys() == wanted.keys()
    for name, grad in wanted.items():
        assert grad.abs().max() > 0, name
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-7 * scale, msg=name)


@pytest.mark.parametrize("model_keys", [TIED, ROTARY], ids=["tied", "rotary"])
@pytest.mark.parametrize(
    ("world", "chunks", "schedule"),
    [(2, 1, None), (4, 1, None), (2, 1, "zb-h1"), (4, 1, "zb-h1"), (2, 2, None), (2, 2, "interleaved")],
)
def test_every_schedule_gives_the_whole_models_loss_and_gradients(world, chunks, schedule, model_keys):
    check(run_ranks(world, run_gpt, model_keys, chunks, schedule), model_keys)


@pytest.mark.parametrize(
    ("changes", "chunks", "shapes"),
    [
        (
            {"num_layers_in_first_pipeline_stage": 1, "num_layers_in_last_pipeline_stage": 3},
            1,
            [[(1, False, True, False)], [(3, True, False, True)]],
        ),
        (
            {"num_layers_in_last_pipeline_stage": 3},
            1,
            [[(1, False, True, False)], [(3, True, False, True)]],
        ),
        (
            {"account_for_embedding_in_pipeline_split": True, "account_for_loss_in_pipeline_split": True},
            1,
            [[(2, False, True, False)], [(2, True, False, True)]],
        ),
        (
            {"num_layers": 2, "account_for_embedding_in_pipeline_split": True}
            | {"account_for_loss_in_pipeline_split": True},
            2,
            [
                [(0, False, True, False), (1, False, False, False)],
                [(1, False, False, False), (0, True, False, True)],
            ],
        ),
    ],
)
def test_uneven_stages(changes, chunks, shapes):
    results = run_ranks(2, run_gpt, TIED, chunks, **changes)
    assert [found for *_, found in results] == shapes
    if "num_layers" not in changes:
        check(results, TIED)
    else:
        ((reports, wanted, _),) = run_ranks(1, run_gpt, TIED, num_layers=2)
        assert [r["loss"] for r in results[1][0]] == pytest.approx([r["loss"] for r in reports], rel=1e-6)
        found = results[0][1] | results[1][1]
        for name, grad in wanted.items():
            torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-7, msg=name)


def test_a_scaled_loss_scales_every_gradient():
    check(run_ranks(2, run_gpt, TIED, 1, "1f1b", scale=4096.0), TIED, scale=4096.0)


def test_gradients_added_into_main_grad_by_the_layers_are_the_same():
    results = run_ranks(2, run_gpt, ROTARY, 1, "zb-h1", gradient_accumulation_fusion=True)
    check(results, ROTARY)


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
def test_recomputed_layers_give_the_same(schedule):
    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    check(run_ranks(2, run_gpt, TIED, 1, schedule, **full), TIED)


@pytest.mark.parametrize("by_call", [False, True])
@pytest.mark.parametrize(("chunks", "schedule"), [(1, "1f1b"), (1, "zb-h1"), (2, "interleaved")])
def test_gradients_reduced_behind_backward_are_the_same(chunks, schedule, by_call):
    """Two pipelines on the same data: their average is what one gives."""
    ddp = {"overlap_grad_reduce": True, "bucket_size": 300}
    results = run_ranks(4, run_gpt, TIED, chunks, schedule, pp=2, ddp=ddp, by_call=by_call)
    for column in range(2):
        check([results[column], results[column + 2]], TIED)
