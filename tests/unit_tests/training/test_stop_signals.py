"""Whose signals are answered, and what becomes of them in forked and waiting processes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


def run(code: str, **options) -> subprocess.CompletedProcess:
    """Run Python code that may end by a signal."""
    imports = (
        "import os, signal, sys, threading, time\nfrom megatron.training.processes import stop_signals\n"
    )
    code = imports + code
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
        check=False,
        **options,
    )


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2"])
def test_a_signal_ends_with_a_line_and_its_status(name: str):
    done = run(f"stop_signals.install('early'); os.kill(os.getpid(), signal.{name}); time.sleep(60)")
    assert done.returncode == 128 + getattr(signal, name)
    assert done.stderr == f"error: stopped by {name} early\n"


def test_ignored_and_handled_signals_keep_their_handlers():
    done = run(
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "signal.signal(signal.SIGUSR1, lambda *_: print('mine', flush=True))\n"
        "stop_signals.install(); os.kill(os.getpid(), signal.SIGHUP); os.kill(os.getpid(), signal.SIGUSR1)\n"
        "time.sleep(0.5); print('alive')"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "mine\nalive\n", "")


def test_handlers_of_native_libraries_are_kept():
    done = run(
        "import faulthandler; faulthandler.register(signal.SIGUSR1)\n"
        "stop_signals.install(); os.kill(os.getpid(), signal.SIGUSR1); time.sleep(0.5); print('alive')"
    )
    assert (done.returncode, done.stdout) == (0, "alive\n")
    assert "most recent call first" in done.stderr


def test_answered_handles_signals_during_a_run_without_run_main():
    code = (
        "@stop_signals.answered\n"
        "def pretrain(wait):\n"
        "    try:\n"
        "        os.kill(os.getpid(), wait and signal.SIGTERM); time.sleep(wait)\n"
        "    finally:\n"
        "        print('tidied up')\n"
    )
    done = run(f"{code}pretrain(60)")
    assert (done.returncode, done.stdout) == (143, "tidied up\n")
    assert done.stderr == "error: stopped by SIGTERM before training began: nothing to save\n"
    after = run(f"{code}pretrain(0); os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)")
    assert after.returncode == -signal.SIGTERM


def test_a_stop_unwinds_the_run_and_is_held_back_where_asked():
    done = run(
        "from megatron.training.entry import run_main\n"
        "def main():\n"
        "    try:\n"
        "        with stop_signals.held_back():\n"
        "            os.kill(os.getpid(), signal.SIGTERM); time.sleep(0.2); print('held')\n"
        "        print('not reached')\n"
        "    finally:\n"
        "        print('tidied up')\n"
        "run_main(main)"
    )
    assert (done.returncode, done.stdout) == (143, "held\ntidied up\n")
    assert done.stderr == "error: stopped by SIGTERM\n"


def test_an_error_made_of_a_stop_is_reported_as_the_stop():
    done = run(
        "from megatron.training.entry import run_main\n"
        "def main():\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGINT); time.sleep(60)\n"
        "    except BaseException as stop:\n"
        "        raise RuntimeError('of a library') from stop\n"
        "run_main(main)"
    )
    assert (done.returncode, done.stderr) == (130, "error: stopped by SIGINT\n")


def test_the_process_ends_although_its_main_thread_does_not_return(tmp_path: Path):
    done = run(
        "from megatron.training.entry import run_main\n"
        "def main():\n"
        "    lock = threading.Lock(); lock.acquire()\n"
        f"    with stop_signals.unfinished({str(tmp_path / 'half')!r}):\n"
        f"        os.mkdir({str(tmp_path / 'half')!r})\n"
        "        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()\n"
        "        while True:\n"
        "            try: lock.acquire()\n"
        "            except BaseException: pass\n"
        "run_main(main)"
    )
    assert (done.returncode, done.stderr) == (143, "error: stopped by SIGTERM\n")
    assert not (tmp_path / "half").exists()


def test_a_second_interrupt_ends_at_once_and_one_key_press_counts_once():
    code = (
        "class Recorder:\n"
        "    def record(self, number): print(number, flush=True)\n"
        "signals = stop_signals.install('in a save'); signals.run(None); signals.recorder = Recorder()\n"
        "me = os.getpid()\n"
        "os.kill(me, signal.SIGINT); os.kill(me, signal.SIGINT)\n"
        "time.sleep(0.5); print('alive', flush=True)\n"
    )
    once = run(code)
    assert once.returncode == 0 and once.stdout.endswith("alive\n")
    twice = run(code + "os.kill(me, signal.SIGINT); time.sleep(60)")
    assert twice.returncode == 130
    assert "error: stopped at once by a second SIGINT" in twice.stderr and "in a save" in twice.stderr


def test_a_forked_process_has_the_previous_handlers():
    done = run(
        "stop_signals.install('parent')\n"
        "for _ in range(50):\n"  # at every moment of its first milliseconds
        "    child = os.fork()\n"
        "    if not child:\n"
        "        time.sleep(20); os._exit(1)\n"
        "    os.kill(child, signal.SIGTERM); _, status = os.waitpid(child, 0)\n"
        "    print(os.WTERMSIG(status), end=' ')\n"
        "time.sleep(0.3)"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, 50 * "15 ", "")


def test_a_process_without_standard_streams_handles_signals():
    code = (
        "import os; os.closerange(0, 3)\n"
        "import signal, time; from megatron.training.processes import stop_signals\n"
        "stop_signals.install(); os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, timeout=60, check=False)
    assert done.returncode == 143
