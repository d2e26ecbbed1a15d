"""A GPT split over ranks against the same GPT on one: weights, logits, loss, gradients; and its dropout."""

import itertools

import pytest
import torch
from split_models import (
    MODELS,
    SEED,
    batch,
    build,
    cut_like,
    loss_of,
    train_step,
)

from megatron.core import parallel_state
from megatron.core.fusions import fused_bias_dropout
from megatron.core.models.common.embeddings import language_model_embedding
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer import dot_product_attention
from megatron.core.transformer.enums import AttnBackend
from tests.distributed.pool import run_ranks

NAMES = list(MODELS)


def compare_with_whole(name, te_names):
    parallel_state.initialize_model_parallel(1)
    wholes = {}
    for fused in (False, True):
        whole = build(name, te_names, bias_activation_fusion=fused)
        with torch.no_grad():
            logits = whole(*batch()[:2], None)
        wholes[fused] = (whole, logits, *train_step(whole))
    size = torch.distributed.get_world_size()
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(size)
    for sp, fused in itertools.product((False, True), repeat=2):
        fields = {"tensor_model_parallel_size": size, "sequence_parallel": sp}
        model = build(name, te_names, **fields, bias_activation_fusion=fused)
        whole, whole_logits, whole_loss, whole_gradients = wholes[fused]
        weights = dict(whole.named_parameters())
        assert list(weights) == [key for key, _ in model.named_parameters()]
        for key, parameter in model.named_parameters():
            assert torch.equal(parameter, cut_like(weights[key], parameter)), key
        with torch.no_grad():
            logits = gather_from_tensor_model_parallel_region(model(*batch()[:2], None))
        torch.testing.assert_close(logits, whole_logits)
        loss, gradients = train_step(model)
        torch.testing.assert_close(loss, whole_loss)
        for key, parameter in model.named_parameters():
            expected = cut_like(whole_gradients[key], parameter)
            torch.testing.assert_close(
                gradients[key], expected, msg=lambda text, k=key, s=sp: f"{k}, sp {s}: {text}"
            )


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(("name", "te_names"), [("gpt", False), ("llama", False), ("llama", True)])
def test_split_model_equals_one_rank(name, te_names, ranks):
    run_ranks(ranks, compare_with_whole, name, te_names)


def stage_weights(name, tensor_size, virtual, cpu):
    whole = dict(build(name, use_cpu_initialization=cpu, num_layers=4).named_parameters())
    stages = torch.distributed.get_world_size() // tensor_size
    parallel_state.initialize_model_parallel(tensor_size, stages, virtual)
    stage, layers = parallel_state.get_pipeline_model_parallel_rank(), 4 // (stages * (virtual or 1))
    seen = set()
    for chunk in range(virtual or 1):
        if virtual:
            parallel_state.set_virtual_pipeline_model_parallel_rank(chunk)
        ends = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
        model = build(
            name,
            stage=ends,
            pipeline=True,
            num_layers=4,
            tensor_model_parallel_size=tensor_size,
            pipeline_model_parallel_size=stages,
            virtual_pipeline_model_parallel_size=virtual,
            pipeline_dtype=torch.float64,
            use_cpu_initialization=cpu,
        )
        for key, parameter in model.named_parameters():
            full_key = key
            if key.startswith("decoder.layers."):
                local, rest = key.removeprefix("decoder.layers.").split(".", 1)
                full_key = f"decoder.layers.{int(local) + (chunk * stages + stage) * layers}.{rest}"
            if key == "output_layer.weight" and name == "gpt":
                full_key = "embedding.word_embeddings.weight"
                assert parameter.shared
                assert parameter.shared_embedding
            assert torch.equal(parameter, cut_like(whole[full_key], parameter)), full_key
            seen.add(full_key)
        if name == "gpt" and ends[0]:
            first = model.embedding.word_embeddings.weight
            assert first.shared_embedding
            assert not hasattr(first, "shared")
    return seen, set(whole)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("tensor_size", "virtual", "cpu"), [(2, None, False), (1, None, True), (2, 2, False), (2, None, True)]
)
def test_stages_hold_the_same_weights(name, tensor_size, virtual, cpu):
    answers = run_ranks(4, stage_weights, name, tensor_size, virtual, cpu)
    assert set().union(*(seen for seen, _ in answers)) == answers[0][1]


class Recorder:
    """Stands in for ``dropout`` and keeps the masks that the real one makes."""

    def __init__(self, module):
        self.module, self.real, self.masks = module, module.dropout, []

    def __enter__(self):
        self.module.dropout = self.record
        return self.masks

    def __exit__(self, *_):
        self.module.dropout = self.real

    def record(self, x, p):
        self.masks.append(self.real(torch.ones_like(x), p) != 0)
        return x * self.masks[-1] / (1 - p)


def masks_of_one_step(sp, recompute):
    """Masks by kind, in the order drawn; with recomputation the second half repeats the first."""
    size = torch.distributed.get_world_size()
    parallel_state.initialize_model_parallel(size)
    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    model = build(
        "gpt",
        tensor_model_parallel_size=size,
        sequence_parallel=sp,
        hidden_dropout=0.5,
        attention_dropout=0.5,
        attention_backend=AttnBackend.unfused,
        **(full if recompute else {}),
    )
    with (
        Recorder(language_model_embedding) as embedding,
        Recorder(fused_bias_dropout) as hidden,
        Recorder(dot_product_attention) as attention,
    ):
        loss_of(model).sum().backward()
    states = get_cuda_rng_tracker().get_states()["model-parallel-rng"], torch.get_rng_state()
    return {"embedding": embedding, "hidden": hidden, "attention": attention}, states


@pytest.mark.parametrize("sp", [False, True])
def test_dropout_masks(sp):
    """Equal where ranks hold the same activations, different where they hold different ones."""
    (first, first_states), (second, second_states) = run_ranks(2, masks_of_one_step, sp, False)
    for kind, count in (("embedding", 1), ("hidden", 4), ("attention", 2)):
        assert len(first[kind]) == len(second[kind]) == count
        split = sp or kind == "attention"
        for one, other in zip(first[kind], second[kind], strict=True):
            assert 0.3 < float(one.double().mean()) < 0.7
            assert torch.equal(one, other) != split, kind
        assert len({mask.numpy().tobytes() for mask in first[kind]}) == count
    assert torch.equal(first_states[1], second_states[1])  # the default stream stays common
    (again, again_states), _ = run_ranks(2, masks_of_one_step, sp, True)
    for kind, per_layer in (("hidden", 2), ("attention", 1)):
        forward, backward = again[kind][: 2 * per_layer], again[kind][2 * per_layer :]
        layers = [backward[per_layer:], backward[:per_layer]]  # backward starts with the last layer
        repeated = [mask for layer in layers for mask in layer]
        for masks in (forward, repeated):
            assert all(torch.equal(*pair) for pair in zip(masks, first[kind], strict=True))
    assert all(torch.equal(*pair) for pair in zip(again_states, first_states, strict=True))


POLICIES = {
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    "distributed": {
        "recompute_granularity": "full",
        "recompute_method": "block",
        "recompute_num_layers": 2,
        "distribute_saved_activations": True,
    },
    "core_attn": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "norm and mlp": {"recompute_granularity": "selective", "recompute_modules": ["layernorm", "mlp"]},
}


def recompute_gives_the_same(name, te_names):
    size = torch.distributed.get_world_size()
    parallel_state.initialize_model_parallel(size)
    for sp in (False, True):
        fields = {
            "tensor_model_parallel_size": size,
            "sequence_parallel": sp,
            "hidden_dropout": 0.3,
            "attention_dropout": 0.3,
        }
        loss, gradients = train_step(build(name, te_names, **fields))
        for policy, settings in POLICIES.items():
            if sp and policy == "distributed":
                continue
            again, recomputed = train_step(build(name, te_names, **fields, **settings))
            assert torch.equal(again, loss), policy
            for key, grad in gradients.items():
                assert torch.equal(recomputed[key], grad), (policy, sp, key)


@pytest.mark.parametrize(("name", "te_names"), [("gpt", False), ("llama", True)])
def test_recomputation_changes_no_bit(name, te_names):
    run_ranks(2, recompute_gives_the_same, name, te_names)


def saved_bytes(distribute):
    """Bytes that autograd keeps of the layers' inputs."""
    size = torch.distributed.get_world_size()
    parallel_state.initialize_model_parallel(size)
    settings = POLICIES["distributed"] | {"distribute_saved_activations": distribute}
    model = build("llama", tensor_model_parallel_size=size, **settings)
    loss = loss_of(model)
    seen, todo, kept = set(), [loss.grad_fn], 0
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        todo.extend(following for following, _ in node.next_functions)
        call = getattr(node, "call", None)
        if call is not None:
            shares = [value.piece for value in call.others if hasattr(value, "piece")]
            kept += sum(
                t.untyped_storage().nbytes() for t in (*shares, *node.saved_tensors[:1]) if t.dim() != 4
            )
    return kept


def test_distributed_activations_are_kept_once():
    whole, shares = run_ranks(2, saved_bytes, False), run_ranks(2, saved_bytes, True)
    assert whole[0] == 2 * shares[0] > 0


def drifted_norms():
    parallel_state.initialize_model_parallel(torch.distributed.get_world_size())
    model = build("llama", tensor_model_parallel_size=2)
    attention = model.decoder.layers[1].self_attention
    attention.run_realtime_tests()
    if torch.distributed.get_rank() == 1:
        with torch.no_grad():
            attention.k_layernorm.weight[3] += 1e-7
    try:
        attention.run_realtime_tests()
    except Exception as error:
        return str(error)
    return "equal"


def test_drifted_head_norms_are_found():
    first, second = run_ranks(2, drifted_norms)
    assert first == "equal"
    assert second.startswith("layer 2: k_layernorm.weight differs from that of tensor-parallel rank 0")


def test_weights_follow_the_seed():
    one, other = (dict(build("gpt", seed=seed).named_parameters()) for seed in (SEED, SEED + 1))
    key = "decoder.layers.0.mlp.linear_fc1.weight"
    assert not torch.equal(one[key], other[key])
    assert not torch.equal(one[key], one[key.replace("0", "1", 1)])
