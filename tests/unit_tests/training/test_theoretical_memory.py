"""The memory report, against counts made by hand."""

from argparse import Namespace

import pytest

from megatron.training import theoretical_memory_usage as theory


def arguments(**changes) -> Namespace:
    # GPT-3's small model: 12 layers, 768 wide, the usual 4h MLP.
    settings = {
        "num_layers": 12,
        "hidden_size": 768,
        "ffn_hidden_size": 3072,
        "num_attention_heads": 12,
        "kv_channels": 64,
        "group_query_attention": False,
        "num_query_groups": 1,
        "swiglu": False,
        "num_experts": None,
        "moe_layer_freq": 1,
        "moe_ffn_hidden_size": None,
        "expert_model_parallel_size": 1,
        "expert_tensor_parallel_size": 1,
        "moe_shared_expert_intermediate_size": None,
        "padded_vocab_size": 51200,
        "untie_embeddings_and_output_weights": False,
        "pipeline_model_parallel_size": 1,
        "virtual_pipeline_model_parallel_size": None,
        "tensor_model_parallel_size": 1,
        "data_parallel_size": 1,
        "use_distributed_optimizer": False,
        "seq_length": 1024,
        "micro_batch_size": 4,
        "sequence_parallel": False,
        "recompute_granularity": None,
    }
    return Namespace(**{**settings, **changes})


def test_parameters_of_a_plain_model():
    # A layer: q, k, v, projection 4·768² and MLP 8·768² weights, two norms of 2·768; then the final norm.
    layer = 12 * 768 * 768 + 4 * 768
    count = theory.estimate_parameters(arguments())
    assert count.block == 12 * layer + 2 * 768
    assert count.embedding == 768 * 51200
    assert count.most_loaded_shard == count.block + count.embedding


def test_parameters_of_a_gated_grouped_untied_model():
    # Llama-2-70B: its 64 x 128 heads share 8 key-value heads.
    args = arguments(
        num_layers=80, hidden_size=8192, ffn_hidden_size=28672, num_attention_heads=64, kv_channels=128,
        group_query_attention=True, num_query_groups=8, swiglu=True, padded_vocab_size=32000,
        untie_embeddings_and_output_weights=True,
        tensor_model_parallel_size=8, pipeline_model_parallel_size=4,
    )  # fmt: skip
    attention = 2 * 8192 * 8192 + 2 * 8192 * 1024
    layer = attention + 3 * 8192 * 28672 + 4 * 8192
    count = theory.estimate_parameters(args)
    assert count.block == 80 * layer + 2 * 8192
    assert count.embedding == 2 * 8192 * 32000
    assert (count.block + count.embedding) / 1e9 == pytest.approx(68.98, abs=0.01)  # the published size
    assert count.most_loaded_shard == (count.block / 4 + 8192 * 32000) / 8
    assert count.other_shards == count.block / 4 / 8


@pytest.mark.parametrize(("frequency", "moe_layers"), [(1, 12), (2, 6), ([0] * 4 + [1] * 8, 8)])
def test_parameters_of_experts(frequency, moe_layers: int):
    args = arguments(num_experts=8, moe_layer_freq=frequency, moe_ffn_hidden_size=512, moe_router_topk=2)
    attention_and_norms = 4 * 768 * 768 + 4 * 768
    dense, experts = 2 * 768 * 3072, 8 * 2 * 768 * 512
    expected = 12 * attention_and_norms + moe_layers * experts + (12 - moe_layers) * dense + 2 * 768
    assert theory.estimate_parameters(args).block == expected


def test_experts_are_shared_by_ranks_of_their_own():
    """Of 8 ranks: tensor 2 x data 4 for dense weights; expert 4 x expert tensor 1, so 2 replicas each."""
    args = arguments(
        num_experts=8,
        moe_layer_freq=1,
        moe_ffn_hidden_size=512,
        moe_router_topk=2,
        tensor_model_parallel_size=2,
        data_parallel_size=4,
        context_parallel_size=1,
        expert_model_parallel_size=4,
        expert_tensor_parallel_size=1,
    )
    count = theory.estimate_parameters(args)
    experts = 12 * 8 * 2 * 768 * 512
    dense = count.block - experts + count.embedding
    assert count.most_loaded_shard == dense / 2 + experts / 4
    args.use_distributed_optimizer = True
    assert theory.compute_weight_and_optimizer_memory(args) == pytest.approx(
        dense / 2 * (6 + 12 / 4) + experts / 4 * (6 + 12 / 2)
    )


@pytest.mark.parametrize(
    ("changes", "bytes_each"),
    [
        ({}, 18),
        ({"data_parallel_size": 4}, 18),
        ({"use_distributed_optimizer": True, "data_parallel_size": 4}, 9),
    ],
)
def test_bytes_per_parameter_follow_the_flags(changes: dict, bytes_each: float):
    args = arguments(**changes)
    expected = theory.estimate_parameters(args).most_loaded_shard * bytes_each
    assert theory.compute_weight_and_optimizer_memory(args) == expected


TOKENS = 4 * 1024
PER_LAYER = TOKENS * 768 * (18 + 16)


@pytest.mark.parametrize(
    ("changes", "microbatches", "expected"),
    [
        ({}, 1, 12 * PER_LAYER + TOKENS * (8 + 768) + TOKENS * 768 * 4 * (1 + 51200 / 768)),
        ({"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 4}, 8,
         (12 * PER_LAYER + TOKENS * (8 + 768) * 4) / 2),
        ({"pipeline_model_parallel_size": 4}, None, 12 * PER_LAYER + TOKENS * (8 + 768) * 4),
        ({"pipeline_model_parallel_size": 4}, 3, (12 * PER_LAYER + TOKENS * (8 + 768) * 4) * 3 / 4),
        ({"pipeline_model_parallel_size": 4, "virtual_pipeline_model_parallel_size": 3}, 8,
         (12 * PER_LAYER + TOKENS * (8 + 768) * 4) * (1 + 3 / 12)),
    ],
)  # fmt: skip
def test_activation_bytes_equal_hand_written_sums(changes: dict, microbatches: int | None, expected: float):
    assert theory.compute_activation_memory(arguments(**changes), microbatches) == pytest.approx(expected)


def test_report_prints_both_estimates(capsys: pytest.CaptureFixture):
    theory.report_theoretical_memory(arguments(), verbose=True)
    # 84,973,056 parameters in the block, 39,321,600 in the embedding; 18 bytes each.
    assert capsys.readouterr().out == (
        "Number of parameters in transformer block in billions:  0.08\n"
        "Number of parameters in embedding layers in billions: 0.04\n"
        "Total number of parameters in billions: 0.12\n"
        "Number of parameters in most loaded shard in billions: 0.1243\n"
        "Theoretical memory footprints: weight and optimizer=2133.66 MB\n"
    )
    args = arguments(hidden_size=64, num_layers=2, kv_channels=16, num_attention_heads=4, ffn_hidden_size=256,
                     padded_vocab_size=640)  # fmt: skip
    theory.report_theoretical_memory(args, verbose=True)
    # 98,944 parameters in the block, 40,960 in the embedding.
    assert capsys.readouterr().out.splitlines()[:4] == [
        "Number of parameters in transformer block in thousands:  98.94",
        "Number of parameters in embedding layers in thousands: 40.96",
        "Total number of parameters in millions: 0.14",
        "Number of parameters in most loaded shard in millions: 0.1399",
    ]
    args = arguments(
        sequence_parallel=True, recompute_granularity="selective", pipeline_model_parallel_size=2
    )
    theory.report_theoretical_memory(args, num_microbatches=1, verbose=True)
    out = capsys.readouterr().out.splitlines()
    assert out[-4].startswith("Number of parameters in other shards in billions: 0.0425")
    assert out[-3] == "Activation memory footprint per transformer layer: 102.0 MB"
    assert out[-2] == "Number of in-flight microbatches: 1"
    assert out[-1].startswith(
        "Theoretical memory footprints: weight and optimizer=1404.33 MB, activation=615.03 MB, t"
    )
