"""Idle time of schedules against the published formulas."""

import pytest

from megatron.core.pipeline_parallel.actions import Compute, Exchange, Message, PassKind
from megatron.core.pipeline_parallel.planning import make_schedules
from megatron.core.pipeline_parallel.timeline import Durations, make_timeline

TIMES = [Durations(1, 1, 1), Durations(1, 0.5, 0.5), Durations(2, 3, 1), Durations(1.5, 1, 0.75)]
SIZES = [(2, 2), (2, 7), (3, 3), (4, 4), (4, 10), (6, 6), (8, 24)]


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize(("p", "m"), SIZES)
def test_1f1b_is_idle_p_minus_1_over_m(p, m, times):
    timeline = make_timeline(make_schedules("1f1b", p, m), durations=times)
    assert timeline.bubble_fraction == pytest.approx((p - 1) / m)
    whole = times.forward + times.input_gradient + times.weight_gradient
    assert timeline.makespan == pytest.approx((m + p - 1) * whole)
    assert timeline.idle_share == pytest.approx((p - 1) / (m + p - 1))


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize(("p", "m", "v"), [(2, 4, 2), (2, 8, 5), (3, 6, 2), (4, 8, 2), (4, 4, 4), (8, 16, 3)])
def test_interleaving_divides_that_by_v(p, m, v, times):
    timeline = make_timeline(make_schedules("interleaved", p, m, v), v, times)
    assert timeline.bubble_fraction == pytest.approx((p - 1) / (v * m))


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize(("p", "m"), SIZES)
def test_zb_h1_follows_table_1_of_its_paper(p, m, times):
    timeline = make_timeline(make_schedules("zb-h1", p, m), durations=times)
    f, b, w = times.forward, times.input_gradient, times.weight_gradient
    assert timeline.makespan - timeline.busy() == pytest.approx((p - 1) * (f + b - w))


def test_zb_h1_with_equal_times_is_idle_a_third_as_long_as_1f1b():
    plain, split = (make_timeline(make_schedules(name, 4, 8)) for name in ("1f1b", "zb-h1"))
    assert split.bubble_fraction == pytest.approx(plain.bubble_fraction / 3) == pytest.approx(3 / 8 / 3)


def test_spans_of_two_stages_by_hand():
    timeline = make_timeline(make_schedules("1f1b", 2, 1), durations=Durations(1, 2, 3))
    spans = [[(s.compute.kind.value, s.start, s.end) for s in rank] for rank in timeline.ranks]
    assert spans == [[("F", 0, 1), ("B", 7, 12)], [("F", 1, 2), ("B", 2, 7)]]


def test_one_stage_is_never_idle():
    assert make_timeline(make_schedules("1f1b", 1, 5)).bubble_fraction == 0


def test_a_schedule_that_hangs_is_refused():
    waits_for_what_is_never_sent = [
        [Compute(PassKind.FORWARD, 0, 0)],
        [Exchange((Message(False, False, 0, 0, 0),)), Compute(PassKind.FORWARD, 0, 0)],
    ]
    with pytest.raises(ValueError, match=r"ranks \[1\] wait for ever"):
        make_timeline(waits_for_what_is_never_sent)
