"""The detector of slow ranks, and its switch, turned by real requests."""

import logging
import threading
import time
import urllib.error
import urllib.request

import pytest
import torch.distributed as dist

from megatron.core.utils import StragglerDetector
from megatron.core.utils.straggler import RemoteSwitch
from tests.distributed.pool import run_ranks

# Far more than a loaded machine's delay between two statements
SLEEP_S = 0.25


def get(port, path="/"):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
        return answer.status, answer.read().decode()


@pytest.fixture
def detector():
    StragglerDetector().close()
    StragglerDetector._instance = None
    yield StragglerDetector()
    StragglerDetector().close()


def test_nothing_happens_before_it_is_configured(detector):
    assert detector is StragglerDetector()
    with detector(bdata=True), detector:
        pass
    assert not detector.report(1e9, 10)
    assert (detector.enabled, detector.configured, detector.port) == (False, False, None)
    assert detector.elapsed() == (0.0, 0.0, 0, 0, 0, 0)


def test_regions_add_up_and_the_longest_loading_counts(detector, caplog):
    detector.configure(1, 0, amp=2.0, port=0, enabled=True)
    for wait in (0.0, SLEEP_S, 0.0):
        with detector(bdata=True):
            time.sleep(wait)
    for _ in range(2):
        with detector:
            time.sleep(SLEEP_S)
    with detector.paused(), detector:
        time.sleep(SLEEP_S)
    region_ms, data_ms, *sensors = detector.elapsed()
    assert region_ms >= 2 * 1e3 * SLEEP_S
    assert data_ms >= 1e3 * SLEEP_S
    assert sensors == [0, 0, 0, 0]
    with caplog.at_level(logging.INFO):
        assert detector.report(total_flops=4e12, log_interval=2)
    # 2 TFLOP a step, over the region's time per step times amp
    (line,) = caplog.messages
    expected = 2.0 / (region_ms / 2 * 1e-3 * 2.0)
    assert f"slowest rank 0: {region_ms / 2:.2f} ms (data {data_ms:.2f})" in line
    assert float(line.split("about ")[1].split()[0]) == pytest.approx(expected, abs=0.01)
    assert detector.elapsed()[:2] == (0.0, 0.0)
    assert not detector.report()


def test_an_error_passes_through(detector):
    detector.configure(1, 0, port=0, enabled=True)
    for region in (detector, detector(bdata=True)):
        with pytest.raises(ValueError, match="mine"), region:
            raise ValueError("mine")
    assert detector.enabled


def test_requests_turn_the_switch_with_the_next_report(detector):
    detector.configure(1, 0, port=0)
    assert detector.port
    for wanted in (True, False):
        status, text = get(detector.port)
        assert (status, text.split()[-1]) == (200, "on" if wanted else "off")
        assert detector.enabled is not wanted
        assert get(detector.port, "/status")[1].split()[-1] == ("on" if wanted else "off")
        detector.report()
        assert detector.enabled is wanted
    with pytest.raises(urllib.error.HTTPError, match="404"):
        get(detector.port, "/favicon.ico")
    detector.report()
    assert not detector.enabled


def test_the_switch_is_for_this_machine_and_goes_with_the_detector(detector):
    before = set(threading.enumerate())
    detector.configure(1, 0, port=0)
    port = detector.port
    assert detector._switch._server.server_address[0] == "127.0.0.1"
    detector.configure(1, 0, port=0, enabled=True)  # once is enough
    assert (detector.port, detector.enabled) == (port, False)
    detector.close()
    assert set(threading.enumerate()) <= before
    with pytest.raises(urllib.error.URLError):
        get(port)
    detector.configure(1, 0, port=port)  # the port is free again
    assert detector.port == port


def test_a_port_in_use_is_told_and_nothing_else_changes(detector, caplog):
    other = RemoteSwitch("another", 0, False)
    try:
        detector.configure(1, 0, port=other.port, enabled=True)
    finally:
        other.close()
    assert f"port {other.port} cannot be listened on" in caplog.text
    assert "choose another" in caplog.text
    with detector:
        pass
    assert detector.report(1.0, 1)
    assert detector.enabled


def slow_second_rank():
    """Reports of two ranks, switched on and off again by requests to the first."""
    rank, found = dist.get_rank(), []
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logging.getLogger("megatron.core.utils.straggler").addHandler(handler)
    logging.getLogger("megatron.core.utils.straggler").setLevel(logging.INFO)
    detector = StragglerDetector()
    detector.configure(2, rank, port=0)
    for _ in range(2):
        for _ in range(3):
            with detector:
                time.sleep(SLEEP_S if rank == 1 else 0.0)
        found.append((detector.enabled, detector.report(1e9, 3)))
        if rank == 0:
            get(detector.port)
        found.append((detector.enabled, detector.report()))
    assert (detector.port is None) == (rank == 1)
    detector.close()
    return found, records


def test_two_ranks_switch_together_and_name_the_slow_one():
    (first, said), (second, silence) = run_ranks(2, slow_second_rank)
    assert first == second == [(False, False), (False, False), (True, True), (True, False)]
    assert silence == []
    on, report, off = said
    assert (on, off) == ("the straggler detector is on", "the straggler detector is off")
    slowest, fastest = report.split(" | ")[1:3]
    assert slowest.startswith("slowest rank 1: ") and fastest.startswith("fastest rank 0: ")
    assert float(slowest.split()[3]) >= 1e3 * SLEEP_S > 0
