"""Parts of the failure watcher that need no other ranks: processes, the store, reports, a silent store."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from argparse import Namespace
from datetime import timedelta

import pytest
import torch.distributed as dist

from megatron.training.ranks import failure, report, store, store_thread, watcher
from megatron.training.ranks.failure import FirstOnHost
from megatron.training.ranks.heartbeat import Heartbeat, Process, Session, _status
from megatron.training.ranks.rendezvous import ArgumentComparison, comparable
from megatron.training.ranks.report import Finding, explain, missing_ranks, rank_list, rank_numbers
from megatron.training.ranks.stack_location import StackLocation
from megatron.training.ranks.store import (
    ConnectionProbe,
    StoreAddress,
    StoreUnavailable,
    WatchedStore,
    connect,
    first_line,
)

LIMIT_S = 60


def wait_until(condition) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_condition_of_a_process_follows_its_state():
    child = subprocess.Popen(
        [sys.executable, "-c", "import time; print(1, flush=True); time.sleep(1000)"], stdout=-1
    )
    try:
        child.stdout.readline()
        seen = Process(*Process.own()[:2], child.pid, _status(child.pid)[1])
        assert seen.condition() == "runs"
        assert seen._replace(started="1").condition() == "ended"  # a later process with the same number
        assert seen._replace(machine="another").condition() == "unknown"
        os.kill(child.pid, signal.SIGSTOP)
        wait_until(lambda: seen.condition() == "stopped")
        os.kill(child.pid, signal.SIGKILL)
        wait_until(lambda: seen.condition() == "ended")  # before anybody has waited for it
    finally:
        child.kill()
        child.communicate()


def test_only_one_process_claims_to_be_first_on_its_host():
    name = f"test {os.getpid()} {time.monotonic()}"
    one, other = FirstOnHost(name), FirstOnHost(name)
    assert one.claim() and one.claim() and not other.claim()
    one.release()
    assert other.claim()
    other.release()


@pytest.mark.parametrize(
    ("ranks", "text"), [([], "none"), ([3], "3"), ([0, 1, 2, 4], "0-2, 4"), ([5, 3], "3, 5"), ([1, 2], "1-2")]
)
def test_consecutive_ranks_are_written_as_spans(ranks: list[int], text: str):
    assert rank_numbers(ranks) == text
    assert rank_list([7]) == "rank 7" and rank_list([1, 3]) == "ranks 1, 3"


def heartbeat(phase: str = "iteration 12", end: str = "", host: str = "b") -> Heartbeat:
    return Heartbeat(
        "n", 1, Process(host, "m", 17, "1"), 4, "n", StackLocation(phase, "f at a.py:1", True), end
    )


def test_missing_ranks_are_named_with_what_started_ones_do():
    heartbeats = {0: heartbeat(), 2: heartbeat("reading its arguments")}
    assert missing_ranks(heartbeats, [0], 4) == (
        "ranks 1-3 (arrived: 0); rank 2 on b (process 17) has started and is in reading its arguments, "
        "f at a.py:1"
    )


@pytest.mark.parametrize(
    ("kind", "end", "text"),
    [
        (
            "ended",
            "",
            "rank 1 on b (process 17) has ended without a word; last seen in iteration 12, f at a.py:1",
        ),
        ("stopped", "", "rank 1 on b (process 17) is stopped by a signal (SIGSTOP)"),
        ("held", "", "rank 1 on b (process 17) does not respond: its process runs, but its code holds"),
        ("silent", "", "rank 1 on b (process 17) does not respond: it is gone, its host is,"),
        ("left", "well", "rank 1 on b (process 17) has ended its run while others go on"),
        ("left", "exit status 3", "rank 1 on b (process 17) has left with exit status 3 while others go on"),
        ("busy", "", "rank 1 on b (process 17) has not come to the others: it is in iteration 12"),
    ],
)
def test_report_names_the_missing_rank_first(kind: str, end: str, text: str):
    findings = {rank: Finding("waits", heartbeat()) for rank in (0, 2, 3)}
    findings[1] = Finding(kind, heartbeat(end=end))
    told = explain(findings, "an error")
    assert told.startswith(text), told
    assert told.endswith("Meanwhile ranks 0, 2-3 wait in iteration 12, f at a.py:1")


def test_report_lists_ranks_that_wait_in_different_calls():
    findings = {0: Finding("waits", heartbeat("x")), 1: Finding("waits", heartbeat("y"))}
    assert explain(findings, "Timed out") == (
        "ranks wait for each other in different calls, or with different sizes: rank 0 waits in x, f at "
        "a.py:1; rank 1 waits in y, f at a.py:1. (Timed out)"
    )


def test_arguments_that_belong_to_one_host_are_not_compared():
    args = Namespace(
        seq_length=4, lr=1e-3, save="/a", rank=1, tensorboard_dir="/b", data_path=["/c"], kind=object()
    )
    assert comparable(args) == {"save": "given", "seq_length": "4", "lr": "0.001"}


def test_differing_arguments_are_named():
    shared = dist.HashStore()
    shared.set_timeout(timedelta(seconds=1))
    other = ArgumentComparison({"seq_length": "16", "lr": "0.1"})
    assert other.with_rank_0(shared, 1) is None
    assert ArgumentComparison({"seq_length": "32", "lr": "0.1"}).with_rank_0(shared, 0) == ""
    assert other.with_rank_0(shared, 1) == (
        "--seq-length is 16 here, but 32 on rank 0. Start all ranks with the same arguments"
    )
    assert ArgumentComparison({"seq_length": "32", "lr": "0.1"}).with_rank_0(shared, 2) == ""


@pytest.mark.parametrize("port", ["", "abc", "0", "65536", "-1"])
def test_invalid_ports_give_no_store_address(port: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", port)
    assert StoreAddress.of_environment(0) is None


@pytest.mark.parametrize(
    ("rank", "environment", "ends"),
    [
        (0, {}, True),
        (1, {}, False),
        (1, {"TORCHELASTIC_USE_AGENT_STORE": "True", "GROUP_RANK": "0", "LOCAL_WORLD_SIZE": "2"}, True),
        (2, {"TORCHELASTIC_USE_AGENT_STORE": "True", "GROUP_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, False),
        (0, {"TORCHELASTIC_USE_AGENT_STORE": "True", "GROUP_RANK": "0", "LOCAL_WORLD_SIZE": "4"}, False),
    ],
    ids=["rank 0 keeps it", "another rank", "on torchrun's first host", "on its second host", "one host"],
)
def test_ranks_know_whether_the_store_ends_with_them(
    rank: int, environment: dict[str, str], ends: bool, monkeypatch: pytest.MonkeyPatch
):
    for name in ("TORCHELASTIC_USE_AGENT_STORE", "GROUP_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    fixed = {"MASTER_ADDR": "localhost", "MASTER_PORT": "1", "WORLD_SIZE": "4"}
    for name, value in {**fixed, **environment}.items():
        monkeypatch.setenv(name, value)
    assert StoreAddress.of_environment(rank).ends_with_this_rank == ends


def test_a_rank_that_takes_the_store_away_leaves_after_the_others(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(report, "CLAIM_S", float(LIMIT_S))
    shared = WatchedStore(dist.HashStore(), NoProbe())
    keeping, other = (
        Session(shared, rank, 2, StoreAddress("", 1, False, True, rank == 0), lambda: None) for rank in (0, 1)
    )
    other.attempt = keeping.attempt
    leaving = threading.Thread(target=report.leave, args=(keeping,))
    leaving.start()
    leaving.join(0.5)
    assert leaving.is_alive()
    report.leave(other)  # waits for nobody
    leaving.join(LIMIT_S / 2)
    assert not leaving.is_alive()


def test_nobody_waits_for_ranks_that_do_not_come_or_for_a_store_that_is_gone(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(report, "CLAIM_S", 0.0)
    monkeypatch.setattr(report, "INTERVAL_S", 0.0)
    address = StoreAddress("", 1, False, True, True)
    report.leave(Session(WatchedStore(dist.HashStore(), NoProbe()), 0, 2, address, lambda: None))

    class Gone(NoProbe):
        def check(self) -> None:
            raise RuntimeError("its process has ended")

    report.leave(Session(WatchedStore(dist.HashStore(), Gone()), 0, 2, address, lambda: None))


def first_problem(host: str, port: int) -> str:
    told, over = [], threading.Event()

    def note(text: str) -> None:
        told.append(text)
        over.set()

    assert connect(StoreAddress(host, port, False, False), over, note) is None
    return told[0]


def test_reason_is_given_for_every_failed_connection(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(store, "FIRST_REPLY_S", 0.3)
    monkeypatch.setattr(store, "OPERATION_S", 1.0)  # else torch tries for long after the test
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
        assert first_problem("127.0.0.1", port).startswith(
            f"nobody listens (connection refused) at 127.0.0.1:{port}"
        )
        listening.listen()
        assert first_problem("127.0.0.1", port).startswith(
            "something listens that is not the store of this job"
        )
        with pytest.raises(
            StoreUnavailable, match=f"MASTER_PORT={port}: another process of this machine listens"
        ):
            connect(StoreAddress("127.0.0.1", port, True, False), threading.Event(), print)
    assert first_problem("no-such-host.invalid", 1).startswith("no machine is known under that name")


def test_first_line_drops_cpp_stack_frames():
    text = (
        "[/x/pair.cc:547] Connection closed by peer [1.2.3.4]:5. This is typically\nException raised from f"
    )
    assert first_line(RuntimeError(text)) == "Connection closed by peer [1.2.3.4]:5."


class Silent:
    """A store whose process is stopped: no request gets a reply."""

    def __init__(self):
        self.released = threading.Event()

    def __getattr__(self, name):
        return self._ask

    def _ask(self, *words: object) -> bool:
        if not self.released.wait(LIMIT_S):
            raise RuntimeError("no test has released this")
        return True


class NoProbe:
    def check(self) -> None: ...


def test_silent_polls_counts_while_one_request_has_no_reply():
    silent = Silent()
    watched = WatchedStore(silent, NoProbe())
    assert [watched.silent_polls() for _ in range(3)] == [0, 0, 0]
    asking = threading.Thread(target=watched.check, args=(["key"],), daemon=True)
    asking.start()
    wait_until(lambda: watched.silent_polls() > 0)
    before = watched.silent_polls()
    assert watched.silent_polls() == before + 1
    silent.released.set()
    asking.join()
    assert watched.silent_polls() == 0


def test_no_request_is_sent_to_a_store_that_is_gone():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        probe = ConnectionProbe(StoreAddress("127.0.0.1", listening.getsockname()[1], False, False), 2)
        accepted, _ = listening.accept()
        probe.check()
        accepted.close()
        with pytest.raises(RuntimeError, match="has ended"):
            WatchedStore(Silent(), probe).check(["key"])
        probe.close()


class Ended(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("own", [True, False])
def test_a_failing_rank_reports_although_the_store_is_silent(own: bool, monkeypatch: pytest.MonkeyPatch):
    told, statuses = [], []

    def end(status: int) -> None:
        statuses.append(status)
        raise Ended

    class Closed(Silent):
        def _ask(self, *words: object) -> bool:
            super()._ask(*words)
            raise RuntimeError("closed")

    silent = Closed()
    monkeypatch.setattr(threading, "excepthook", lambda words: None)
    monkeypatch.setattr(store_thread, "connect", lambda *words: silent)
    monkeypatch.setattr(store_thread, "ConnectionProbe", lambda *words: NoProbe())
    monkeypatch.setattr(watcher, "end_process", end)
    monkeypatch.setattr(watcher, "GRACE_S", 0.3)
    monkeypatch.setattr(watcher, "HOLD_S", 0.0)
    address = StoreAddress(f"test {os.getpid()} {own}", 1, False, False)
    watching = watcher.FailureWatcher(1, 2, address, lambda text, mine: told.append((text, mine)))
    text = (lambda: "the cause") if own else None
    watching.note_failure(failure.Failure(3, text, failure.ERROR if own else failure.CONSEQUENCE, "closed"))
    wait_until(lambda: bool(statuses))
    assert statuses == [3]
    ((words, mine),) = told
    assert mine == own
    if own:
        assert words == "the cause"
    else:
        assert words.startswith(f"the store of the job at {address} does not answer, which is kept by rank 0")
    watching._first_on_host.release()
    silent.released.set()  # the thread that asks it ends
    watching.stop(1)
