"""What misuse raises: an error with a complete message that is also the class Megatron-LM raises there."""

import numpy
import pytest
import torch

from megatron.core import num_microbatches_calculator as microbatches
from megatron.core import parallel_state, utils
from megatron.core.datasets.blended_megatron_dataset_config import BlendedMegatronDatasetConfig
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.errors import MegatronError
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer.grad_scaler import ConstantGradScaler, DynamicGradScaler
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import p2p_communication, schedules
from megatron.core.tensor_parallel import broadcast_data, checkpoint, layers
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
from megatron.core.timers import Timer, Timers
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training import global_vars
from megatron.training.data.samplers import MegatronPretrainingSampler
from megatron.training.tokenizer.null import _NullTokenizer
from tests.distributed.pool import run_ranks

SMALL = {"num_layers": 2, "hidden_size": 8, "num_attention_heads": 4}
DATA = {"random_seed": 1, "sequence_length": 4}


def expect(builtin, call):
    """The call fails, with a message, by an error that is both ours and ``builtin``."""
    with pytest.raises(builtin) as caught:
        call()
    assert isinstance(caught.value, MegatronError), repr(caught.value)
    assert str(caught.value)


def scheduler(**fields):
    given = {
        "optimizer": type("Optimizer", (), {"param_groups": []})(),
        "init_lr": 0.0,
        "max_lr": 1.0,
        "min_lr": 0.0,
        "lr_warmup_steps": 1,
        "lr_decay_steps": 10,
        "lr_decay_style": "linear",
        "start_wd": 0.0,
        "end_wd": 0.0,
        "wd_incr_steps": 10,
        "wd_incr_style": "constant",
    }
    return OptimizerParamScheduler(**given | fields)


def attention(**inputs):
    layer = DotProductAttention(
        TransformerConfig(**SMALL, attention_dropout=0.0), 1, AttnMaskType.causal, "self"
    )
    heads = torch.randn(3, 1, 4, 2)
    return layer(heads, heads, heads, None, **inputs)


def dynamic_scaler(**fields):
    given = {
        "initial_scale": 8.0,
        "min_scale": 1.0,
        "growth_factor": 2.0,
        "backoff_factor": 0.5,
        "growth_interval": 2,
        "hysteresis": 1,
    }
    return DynamicGradScaler(**given | fields)


def started_twice():
    timer = Timer("x")
    timer.start()
    timer.start()


def asked_at_another_level():
    timers = Timers(2, "max")
    timers("x", log_level=1)
    timers("x", log_level=2)


def unwrapped_twice():
    box = utils.WrappedTensor(torch.zeros(1))
    box.unwrap()
    box.unwrap()


def marked_twice():
    weight = torch.nn.Parameter(torch.zeros(1))
    for _ in range(2):
        layers.set_tensor_model_parallel_attributes(weight, True, 0, 1)


def gradient_of_a_recomputed_function():
    x = torch.ones(1, requires_grad=True)
    torch.autograd.grad(checkpoint(lambda y: y * 2, False, x), x)


def vocabulary_of_numbers():
    return _NullTokenizer(5).vocab


def sampler(**fields):
    given = {"total_samples": 8, "consumed_samples": 0, "micro_batch_size": 1}
    return MegatronPretrainingSampler(**given | {"data_parallel_rank": 0, "data_parallel_size": 1} | fields)


ON_ONE_PROCESS = {
    "divide": (AssertionError, lambda: utils.divide(4, 5)),
    "ensure_divisibility": (AssertionError, lambda: utils.ensure_divisibility(4, 5)),
    "view": (AssertionError, lambda: utils.assert_viewless_tensor(torch.zeros(4).view(2, 2))),
    "views": (AssertionError, lambda: utils.assert_viewless_tensor([torch.zeros(4).view(2, 2)])),
    "data_of_a_view": (
        AssertionError,
        lambda: utils.safely_set_viewless_tensor_data(torch.zeros(4).view(2, 2), torch.zeros(1)),
    ),
    "unwrapped_twice": (RuntimeError, unwrapped_twice),
    "absent_attribute": (RuntimeError, lambda: utils.get_attr_wrapped_model(torch.nn.Linear(1, 1), "x")),
    "list_of_models": (RuntimeError, lambda: utils.get_attr_wrapped_model([torch.nn.Linear(1, 1)], "x")),
    "tensor_group": (AssertionError, parallel_state.get_tensor_model_parallel_group),
    "pipeline_group": (AssertionError, parallel_state.get_pipeline_model_parallel_group),
    "data_group": (AssertionError, parallel_state.get_data_parallel_group),
    "context_group": (AssertionError, parallel_state.get_context_parallel_group),
    "context_ranks": (AssertionError, parallel_state.get_context_parallel_global_ranks),
    "expert_group": (AssertionError, parallel_state.get_expert_model_parallel_group),
    "embedding_group": (AssertionError, parallel_state.get_embedding_group),
    "source_rank": (AssertionError, parallel_state.get_data_parallel_src_rank),
    "next_stage": (AssertionError, parallel_state.get_pipeline_model_parallel_next_rank),
    "memory_buffer": (AssertionError, parallel_state.get_global_memory_buffer),
    "shards_without_context": (
        AssertionError,
        lambda: parallel_state.get_data_parallel_group(partial_data_parallel=True),
    ),
    "groups_before_torch": (AssertionError, parallel_state.initialize_model_parallel),
    "no_batch_size": (AssertionError, microbatches.get_num_microbatches),
    "uneven_batch": (
        AssertionError,
        lambda: microbatches.ConstantNumMicroBatchesCalculator(5, 2, 1, False, 0),
    ),
    "uneven_ramp": (
        AssertionError,
        lambda: microbatches.RampupBatchsizeNumMicroBatchesCalculator(10, 1, 1, False, 0, 4, 4, 8),
    ),
    "arguments": (AssertionError, global_vars.get_args),
    "tokenizer": (AssertionError, global_vars.get_tokenizer),
    "timers": (AssertionError, global_vars.get_timers),
    "signal_handler": (AssertionError, global_vars.get_signal_handler),
    "timer_started_twice": (AssertionError, started_twice),
    "timer_not_started": (AssertionError, lambda: Timer("x").stop()),
    "timer_of_another_level": (AssertionError, asked_at_another_level),
    "timer_beyond_the_levels": (AssertionError, lambda: Timers(2, "max")("x", log_level=3)),
    "normalizer": (AssertionError, lambda: Timers(2, "max").get_all_timers_string(normalizer=0.0)),
    "marked_twice": (AssertionError, marked_twice),
    "grad_through_recompute": (RuntimeError, gradient_of_a_recomputed_function),
    "another_dtype": (
        AssertionError,
        lambda: broadcast_data(["x"], {"x": torch.zeros(1)}, torch.int64),
    ),
    "sequence_parallel_alone": (ValueError, lambda: ModelParallelConfig(sequence_parallel=True)),
    "stages_without_dtype": (ValueError, lambda: ModelParallelConfig(pipeline_model_parallel_size=2)),
    "heads_over_ranks": (ValueError, lambda: TransformerConfig(**SMALL, tensor_model_parallel_size=3)),
    "recompute_words": (ValueError, lambda: TransformerConfig(**SMALL, recompute_granularity="some")),
    "two_precisions": (ValueError, lambda: TransformerConfig(**SMALL, fp16=True, bf16=True)),
    "no_precision": (
        AssertionError,
        lambda: Float16Module(TransformerConfig(**SMALL), torch.nn.Linear(1, 1)),
    ),
    "attention_bias": (AssertionError, lambda: attention(attention_bias=torch.zeros(1))),
    "packed_as_rows": (AssertionError, lambda: attention(packed_seq_params=PackedSeqParams("sbhd"))),
    "moments_of_another_dtype": (
        AssertionError,
        lambda: OptimizerConfig(lr=1.0, exp_avg_dtype=torch.bfloat16),
    ),
    "loss_scale": (AssertionError, lambda: ConstantGradScaler(0.0)),
    "backoff": (AssertionError, lambda: dynamic_scaler(backoff_factor=2.0)),
    "growth": (AssertionError, lambda: dynamic_scaler(growth_factor=0.5)),
    "warm_up_beyond_decay": (AssertionError, lambda: scheduler(lr_warmup_steps=10)),
    "no_decay": (AssertionError, lambda: scheduler(lr_decay_steps=0)),
    "falling_weight_decay": (AssertionError, lambda: scheduler(start_wd=1.0)),
    "both_schedules_win": (
        AssertionError,
        lambda: scheduler(override_opt_param_scheduler=True, use_checkpoint_opt_param_scheduler=True),
    ),
    "two_blends": (
        AssertionError,
        lambda: BlendedMegatronDatasetConfig(
            **DATA, blend=(["a"], None), blend_per_split=[(["a"], None)] * 3, split="1,1,1"
        ),
    ),
    "blend_without_split": (
        AssertionError,
        lambda: BlendedMegatronDatasetConfig(**DATA, blend=(["a"], None)),
    ),
    "no_tokenizer": (AssertionError, lambda: GPTDatasetConfig(**DATA)),
    "no_such_files": (AssertionError, lambda: IndexedDataset("/nonexistent/prefix")),
    "chunks": (
        AssertionError,
        lambda: schedules.forward_backward_no_pipelining(
            forward_step_func=None,
            data_iterator=None,
            model=[torch.nn.Linear(1, 1)] * 2,
            num_microbatches=1,
            seq_length=1,
            micro_batch_size=1,
        ),
    ),
    "vocabulary_of_numbers": (NotImplementedError, vocabulary_of_numbers),
    "no_samples": (AssertionError, lambda: sampler(total_samples=0)),
    "all_consumed": (AssertionError, lambda: sampler(consumed_samples=8)),
    "rank_beyond_the_group": (AssertionError, lambda: sampler(data_parallel_rank=1)),
}


@pytest.fixture
def nothing_is_set_up():
    parallel_state.destroy_model_parallel()
    microbatches.destroy_num_microbatches_calculator()
    global_vars.destroy_global_vars()


@pytest.mark.parametrize("name", ON_ONE_PROCESS)
def test_misuse_in_one_process(nothing_is_set_up, name):
    expect(*ON_ONE_PROCESS[name])


@pytest.mark.parametrize("again", [("x", 2), ("y", 1)], ids=["name", "seed"])
def test_a_random_stream_is_added_once(again):
    tracker = CudaRNGStatesTracker()
    tracker.add("x", 1)
    expect(Exception, lambda: tracker.add(*again))


def test_registering_twice(nothing_is_set_up):
    def register():
        microbatches.init_num_microbatches_calculator(0, None, 4, 1, 1, False)

    register()
    expect(AssertionError, register)
    microbatches.destroy_num_microbatches_calculator()
    global_vars._set_once("args", 1)
    expect(AssertionError, lambda: global_vars._set_once("args", 1))
    global_vars.destroy_global_vars()


def check_layouts():
    initialize = parallel_state.initialize_model_parallel
    for sizes in (
        {"tensor_model_parallel_size": 4},
        {"pipeline_model_parallel_size": 4},
        {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
        {"virtual_pipeline_model_parallel_size": 2},
        {"expert_model_parallel_size": 4},
        {"order": "tp-dp", "pipeline_model_parallel_size": 2},
    ):
        expect(RuntimeError, lambda sizes=sizes: initialize(**sizes))
        assert not parallel_state.is_initialized()
    expect(AssertionError, lambda: initialize(pipeline_model_parallel_comm_backend="carrier"))
    initialize(pipeline_model_parallel_size=2)
    expect(AssertionError, initialize)
    config = ModelParallelConfig(pipeline_model_parallel_size=2, pipeline_dtype=torch.float32)
    config.pipeline_dtype = None
    if parallel_state.get_pipeline_model_parallel_rank() == 1:
        expect(RuntimeError, lambda: p2p_communication.recv_forward((1, 1, 1), config))
    parallel_state.destroy_model_parallel()
    initialize(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)
    model = torch.nn.Linear(1, 1)
    model.config = TransformerConfig(
        **SMALL | {"num_layers": 4}, pipeline_model_parallel_size=2, pipeline_dtype=torch.float32
    )
    arguments = {"forward_step_func": None, "seq_length": 4, "micro_batch_size": 1}
    run = schedules.get_forward_backward_func()
    for chunks, batches in ((2, None), (1, [None, None]), (3, [None] * 3)):
        expect(
            AssertionError,
            lambda chunks=chunks, batches=batches: run(
                **arguments, model=[model] * chunks, data_iterator=batches, num_microbatches=2
            ),
        )
    model.model_type = schedules.ModelType.encoder_and_decoder
    expect(
        RuntimeError,
        lambda: run(**arguments, model=[model, model], data_iterator=[None, None], num_microbatches=2),
    )
    return True


def test_misuse_of_layouts():
    assert run_ranks(2, check_layouts) == [True, True]


def test_what_is_no_index_and_no_data_set(tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "x.bin"), numpy.int32)
    builder.add_document(torch.arange(4), [4])
    builder.finalize(str(tmp_path / "x.idx"))
    dataset = IndexedDataset(str(tmp_path / "x"))
    with pytest.raises(ValueError):
        dataset[0:4:2]
    with pytest.raises(TypeError):
        dataset["0"]
    (tmp_path / "x.idx").write_bytes(b"MMAPIDX\0\0" + bytes(40))
    expect(AssertionError, lambda: IndexedDataset(str(tmp_path / "x")))


@pytest.mark.parametrize("slot", [None, "Linear"])
def test_a_slot_without_a_module_is_named(slot):
    with pytest.raises(MegatronError, match=f"a slot of a layer spec holds {slot!r}"):
        build_module(slot)
