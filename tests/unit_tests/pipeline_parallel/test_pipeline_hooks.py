"""What a schedule calls besides the model: hooks, scaling, flags for the layers, and how often it sends."""

import contextlib
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from toy_stages import BATCH, HIDDEN, LENGTH, Stage, expected, forward_func, make_batches, make_config

from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel import schedules as public
from megatron.core.tensor_parallel import deferred_gradients
from tests.distributed.pool import run_ranks


def start(schedule, num_chunks, **changes):
    """This rank's config and chunks."""
    world, virtual = dist.get_world_size(), num_chunks if schedule == "interleaved" else None
    parallel_state.initialize_model_parallel(1, world, create_gloo_process_groups=False)
    parallel_state.set_virtual_pipeline_model_parallel_world_size(virtual)
    config = make_config(
        pipeline_model_parallel_size=world,
        virtual_pipeline_model_parallel_size=virtual,
        pipeline_schedule=schedule,
        **changes,
    )
    rank = parallel_state.get_pipeline_model_parallel_rank()
    return config, [Stage(config, chunk * world + rank) for chunk in range(num_chunks)]


def step(models, num_microbatches, func=None, **arguments):
    first = parallel_state.get_pipeline_model_parallel_rank() == 0
    data = [iter(make_batches(num_microbatches)) if first and n == 0 else None for n in range(len(models))]
    return get_forward_backward_func()(
        forward_step_func=func or forward_func("pair"),
        data_iterator=data if len(models) > 1 else data[0],
        model=models if len(models) > 1 else models[0],
        num_microbatches=num_microbatches,
        seq_length=LENGTH,
        micro_batch_size=BATCH,
        **arguments,
    )


def recorded_hooks(schedule, num_chunks, with_grad_sync):
    """Order of backward passes (chunk, held back?) and collectives (kind, chunk) on this rank."""
    config, models = start(schedule, num_chunks)
    events, held = [], [False] * num_chunks

    @contextlib.contextmanager
    def no_sync(chunk):
        held[chunk] = True
        yield
        held[chunk] = False

    for chunk, model in enumerate(models):
        model.bias.register_hook(lambda grad, chunk=chunk: events.append(("backward", chunk, held[chunk])))
    config.no_sync_func = [partial(no_sync, chunk) for chunk in range(num_chunks)]
    if with_grad_sync:
        config.grad_sync_func = [
            lambda p, chunk=c: events.append(("reduce", chunk)) for c in range(num_chunks)
        ]
    config.param_sync_func = [lambda p, chunk=c: events.append(("gather", chunk)) for c in range(num_chunks)]
    config.finalize_model_grads_func = lambda chunks, tokens: events.append(("finalize", len(chunks)))
    step(models, 4)
    return events


@pytest.mark.parametrize(("schedule", "chunks"), [("1f1b", 1), ("zb-h1", 1), ("interleaved", 2)])
def test_reduction_is_held_back_until_the_last_microbatch_of_a_chunk(schedule, chunks):
    for events in run_ranks(2, recorded_hooks, schedule, chunks, False):
        for chunk in range(chunks):
            held = [event[2] for event in events if event[:2] == ("backward", chunk)]
            assert held == [True, True, True, False]
        assert events[-1] == ("finalize", chunks)
        assert sorted(event for event in events if event[0] == "gather") == [
            ("gather", c) for c in range(chunks)
        ]
        assert not any(event[0] == "reduce" for event in events)


def test_reduction_by_call_starts_after_a_chunks_last_backward_later_on_later_ranks():
    ranks = run_ranks(2, recorded_hooks, "interleaved", 2, True)
    for rank, events in enumerate(ranks):
        assert all(event[2] for event in events if event[0] == "backward")
        backwards = [event[1] for event in events if event[0] == "backward"]
        assert backwards == [1, 1, 0, 0, 1, 1, 0, 0]
        for chunk, last in ((1, 5), (0, 7)):
            before = events[: events.index(("reduce", chunk))]
            assert sum(event[0] == "backward" for event in before) == min(last + 1 + rank, 8)


def test_only_the_first_of_plain_stages_reduces_behind_its_backward_pass():
    first, last = run_ranks(2, recorded_hooks, "1f1b", 1, True)
    assert ("reduce", 0) not in first and first[-2] == ("backward", 0, False)
    assert last[-2:] == [("reduce", 0), ("finalize", 1)]
    assert last[-3] == ("backward", 0, True)


def scaled(num_microbatches):
    config, models = start("1f1b", 1)
    calls = []

    def scale(loss):
        calls.append(float(loss))
        return loss * 1024

    config.grad_scale_func = scale
    step(models, num_microbatches)
    plain = start_again(models)
    config.grad_scale_func = None
    step(models, num_microbatches)
    again = [p.grad for p in models[0].parameters()]
    return len(calls), all(torch.equal(a, b * 1024) for a, b in zip(plain, again, strict=True))


def start_again(models):
    grads = [p.grad for model in models for p in model.parameters()]
    for model in models:
        model.zero_grad()
    return grads


def test_the_loss_is_scaled_once_per_microbatch_on_the_last_stage_only():
    assert run_ranks(2, scaled, 3) == [(0, True), (3, True)]


def on_split_sequences(loss, per_token):
    """Gradient of the weight on one stage, where two ranks share every sequence."""
    parallel_state.initialize_model_parallel(
        1, 1, context_parallel_size=dist.get_world_size(), create_gloo_process_groups=False
    )
    models = [Stage(make_config(calculate_per_token_loss=per_token), 0)]
    step(models, 3, forward_func(loss))
    return models[0].weight.grad


@pytest.mark.parametrize(
    ("loss", "per_token", "factor"),
    [("pair", False, 2), ("triple", False, 2), ("triple", True, 1)],
)
def test_ranks_that_share_a_sequence_count_their_loss_as_often_as_they_are(loss, per_token, factor):
    _, (wanted,) = expected(1, 3, loss, per_token=per_token)
    for found in run_ranks(2, on_split_sequences, loss, per_token):
        torch.testing.assert_close(found, wanted["weight"] * factor, rtol=1e-11, atol=1e-13)


def tokens_counted_elsewhere(num_microbatches):
    """Device of the count handed to the finalizing hook; the loss function's count has no value to read."""
    config, models = start("interleaved", 2, calculate_per_token_loss=True)
    seen = []
    config.finalize_model_grads_func = lambda chunks, tokens: seen.append(tokens.device.type)

    def func(data_iterator, model):
        def loss_func(output):
            return output.sum(), torch.ones((), dtype=torch.int64, device="meta"), {}

        return model(next(data_iterator) if data_iterator is not None else None), loss_func

    step(models, num_microbatches, func)
    return seen


def test_counting_tokens_does_not_wait_for_the_device():
    assert run_ranks(2, tokens_counted_elsewhere, 4) == [["cpu"], ["meta"]]


def seen_under_autocast(enable):
    config, models = start("1f1b", 1)
    config.enable_autocast, config.autocast_dtype = enable, torch.bfloat16
    seen, plain = [], forward_func("pair")

    def func(data_iterator, model):
        seen.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu") == torch.bfloat16))
        return plain(data_iterator, model)

    with torch.no_grad():
        step(models, 1, func, forward_only=True)
    return seen


def test_the_forward_pass_runs_under_autocast_where_asked():
    assert run_ranks(2, seen_under_autocast, True) == [[(True, True)]] * 2
    assert [seen[0][0] for seen in run_ranks(2, seen_under_autocast, False)] == [False, False]


def layers_told(num_microbatches, partial_window):
    """What the forward function and the layers hear about each micro-batch."""
    _, models = start("1f1b", 1, num_microbatches_with_partial_activation_checkpoints=partial_window)
    models[0].decoder = SimpleNamespace(layers=[SimpleNamespace()])
    heard = []
    plain = forward_func("pair")

    def func(data_iterator, model, checkpoint_activations_microbatch):
        heard.append((model.decoder.layers[0].current_microbatch, checkpoint_activations_microbatch))
        return plain(data_iterator, model)

    step(models, num_microbatches, func)
    return heard


def test_layers_know_their_microbatch_and_the_window_of_partial_recomputation():
    first, last = run_ranks(2, layers_told, 4, 1)
    # Two micro-batches in flight on the first stage: every second one is recomputed in full.
    assert first == [(0, False), (1, True), (2, False), (3, True)]
    assert last == [(k, False) for k in range(4)]


def counted(schedule, num_chunks, num_microbatches, batched, **changes):
    """(sends, receives) of this rank, and the timers it used."""
    used = []

    def timers(name, log_level=None):
        used.append((name, log_level))
        return SimpleNamespace(start=lambda: None, stop=lambda: None)

    config, models = start(schedule, num_chunks, batch_p2p_comm=batched, **changes)
    config.timers = timers
    count = {"isend": 0, "irecv": 0, "batches": 0}
    real = {name: getattr(dist, name) for name in ("isend", "irecv", "batch_isend_irecv")}

    def batch(operations):
        count["batches"] += 1
        for operation in operations:
            count[operation.op.__name__] += 1
        return real["batch_isend_irecv"](operations)

    def one(name, *arguments, **keywords):
        count[name] += 1
        return real[name](*arguments, **keywords)

    dist.batch_isend_irecv = batch
    if not batched:
        dist.isend, dist.irecv = partial(one, "isend"), partial(one, "irecv")
    try:
        step(models, num_microbatches)
    finally:
        for name, function in real.items():
            setattr(dist, name, function)
    return count, {name for name, level in used if level == 2}


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize(("schedule", "chunks"), [("1f1b", 1), ("zb-h1", 1), ("interleaved", 2)])
def test_every_boundary_carries_one_activation_and_one_gradient_per_microbatch(schedule, chunks, batched):
    m, ranks = 4, run_ranks(2, counted, schedule, chunks, 4, batched)
    # Boundaries between virtual stages: 2 v - 1, each crossed by m activations and m gradients.
    assert sum(count["isend"] for count, _ in ranks) == 2 * (2 * chunks - 1) * m
    assert sum(count["irecv"] for count, _ in ranks) == 2 * (2 * chunks - 1) * m
    for count, timers in ranks:
        assert (count["batches"] > 0) == batched
        assert {"forward-compute", "backward-compute"} <= timers


def test_variable_lengths_double_the_messages():
    plain, announced = (
        run_ranks(2, counted, "1f1b", 1, 4, True, variable_seq_lengths=variable) for variable in (False, True)
    )
    for (few, _), (many, _) in zip(plain, announced, strict=True):
        assert many["isend"] == 2 * few["isend"] and many["irecv"] == 2 * few["irecv"]


def deferred_in(num_microbatches):
    """Computations put off by each input-gradient pass, and how many run with each weight-gradient pass."""
    _, models = start("zb-h1", 1)
    log = []
    run = deferred_gradients.run

    def logged(n=None):
        log.append((n, deferred_gradients.pending()))
        run(n)

    deferred_gradients.run = logged
    try:
        step(models, num_microbatches)
    finally:
        deferred_gradients.run = run
    return log, deferred_gradients.pending()


def test_weight_gradients_wait_as_long_as_the_rank_is_late():
    first, last = run_ranks(2, deferred_in, 3)
    # One linear layer per stage; rank r keeps r weight gradients back.
    assert first == ([(1, 1), (1, 1), (1, 1)], 0)
    assert last == ([(1, 2), (1, 2), (1, 1)], 0)


def sizes_at_backward(deallocate):
    """Elements that each stage's outputs still have when their backward pass starts."""
    _, models = start("1f1b", 1, deallocate_pipeline_outputs=deallocate)
    sizes, real = [], public.backward_step

    def logged(inputs, outputs, *rest):
        sizes.append(outputs[0].numel())
        return real(inputs, outputs, *rest)

    public.backward_step = logged
    try:
        step(models, 3)
    finally:
        public.backward_step = real
    return sizes


def test_sent_outputs_are_freed_if_configured():
    whole = LENGTH * BATCH * HIDDEN
    assert run_ranks(2, sizes_at_backward, True) == [[1] * 3, [1] * 3]
    assert run_ranks(2, sizes_at_backward, False) == [[whole] * 3, [1] * 3]


def wrong_shape():
    _, models = start("1f1b", 1)
    with contextlib.suppress(StopIteration):
        step(models, 1, lambda data, model: (model(next(data) if data else None)[:2], forward_func("pair")))


def wrong_type():
    _, models = start("1f1b", 1, pipeline_dtype=None, params_dtype=torch.float32)
    step(models, 1)


@pytest.mark.parametrize(
    ("function", "message"),
    [(wrong_shape, r"sends tensors of shapes \[\(2, 2, 6\)\]"), (wrong_type, "pipeline_dtype")],
)
def test_what_stages_did_not_agree_on_is_an_error(function, message):
    with pytest.raises(AssertionError, match=message):
        run_ranks(2, function)


def counts_of_ranks(virtual_size):
    parallel_state.initialize_model_parallel(1, dist.get_world_size(), create_gloo_process_groups=False)
    parallel_state.set_virtual_pipeline_model_parallel_world_size(virtual_size)
    chunks = virtual_size or 1
    return [
        public.get_pp_rank_microbatches(8, chunks, 4, forward_only=False),
        public.get_pp_rank_microbatches(1, chunks, 4, forward_only=False),
        public.get_pp_rank_microbatches(8, chunks, 4, forward_only=True),
    ]


def test_numbers_of_warm_up_passes():
    plain, interleaved = run_ranks(4, counts_of_ranks, None), run_ranks(4, counts_of_ranks, 2)
    assert [rank[0] for rank in plain] == [
        (8, False, 3, 5),
        (8, False, 2, 6),
        (8, False, 1, 7),
        (8, False, 0, 8),
    ]
    assert [rank[1] for rank in plain] == [(1, True, 1, 0)] * 3 + [(1, False, 0, 1)]
    assert [rank[2] for rank in plain] == [(8, True, 8, 0)] * 4
    assert [rank[0][2] for rank in interleaved] == [10, 8, 6, 4]
    assert [rank[1] for rank in interleaved] == [(2, True, 2, 0)] * 4


def test_one_stage_counts_its_first_pass_as_warm_up():
    assert run_ranks(1, counts_of_ranks, None)[0][:2] == [(8, False, 1, 7), (1, True, 1, 0)]


def test_the_table_of_an_interleaved_rank_and_its_order():
    table = public.get_schedule_table(5, 2, 3)
    assert table == [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1), (3, 0), (4, 0), (3, 1), (4, 1)]
    order = public.convert_schedule_table_to_order(4, 2, table)
    assert order == [1, 1, 1, 2, 2, -2, 2, -2, 1, -2, 1, -1, 2, -1, 2, -1, -2, -2, -1, -1]
    assert public.convert_schedule_table_to_order(10, 2, table)[:10] == [1, 1, 1, 2, 2, 2, 1, 1, 2, 2]


def test_shapes_are_split_over_the_ranks_that_share_a_sequence():
    def shape(**changes):
        config = SimpleNamespace(
            **{
                "context_parallel_size": 1,
                "sequence_parallel": False,
                "tensor_model_parallel_size": 2,
                "hidden_size": HIDDEN,
                "variable_seq_lengths": False,
                **changes,
            }
        )
        return public.get_tensor_shapes(
            rank=1,
            model_type=None,
            seq_length=16,
            micro_batch_size=3,
            decoder_seq_length=None,
            config=config,
            encoder_decoder_xattn=False,
        )

    assert shape() == [(16, 3, HIDDEN)]
    assert shape(sequence_parallel=True) == [(8, 3, HIDDEN)]
    assert shape(context_parallel_size=4, sequence_parallel=True) == [(2, 3, HIDDEN)]
    with pytest.raises(ValueError, match="not divisible by the 3 ranks"):
        shape(context_parallel_size=3)


@pytest.mark.parametrize(
    ("first", "forward_only", "expected"), [(None, True, True), (False, True, False), (False, False, True)]
)
def test_the_first_validation_step(first, forward_only, expected):
    assert public.check_first_val_step(first, forward_only, True) is expected
    assert public.check_first_val_step(first, forward_only, False) is False


def test_an_output_is_freed_and_still_runs_backward():
    x = torch.randn(4, 3, requires_grad=True)
    y = x * 2
    public.deallocate_output_tensor(y, False)
    assert y.shape == (4, 3)
    public.deallocate_output_tensor(y, True)
    assert y.numel() == 1 and y.untyped_storage().nbytes() == 4
    public.custom_backward(y, torch.ones(4, 3))
    assert torch.equal(x.grad, torch.full((4, 3), 2.0))
    with pytest.raises(AssertionError, match="view"):
        public.deallocate_output_tensor((x * 2)[1:], True)
    with pytest.raises(ValueError, match="no gradient given"):
        public.custom_backward(x * 2, None)
