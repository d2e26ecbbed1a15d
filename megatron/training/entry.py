"""Running an entry point: it ends well, or with one readable error and a non-zero exit status."""

import atexit
import gc
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from megatron.core.errors import MegatronError
from megatron.training.processes import launcher, stop_signals
from megatron.training.processes.output_streams import tolerate_failing_streams

if TYPE_CHECKING:
    from megatron.training.ranks.watcher import FailureWatcher


def run_main(main: Callable[[], object]) -> None:
    """Run ``main``; print a ``MegatronError`` without a traceback and exit with its status.

    Of several ranks the lowest failing one prints, and all of them end with its status, whatever the
    launcher. ``MEGATRON_TRACEBACK=1`` keeps the traceback, for debugging the program itself.
    """
    tolerate_failing_streams()
    launcher.set_rank_variables()
    found = stop_signals.installed()
    signals = stop_signals.install()
    watcher = _watch_ranks_of_environment()
    status = 1
    try:
        _run_to_its_end(main, watcher, signals)
        status = 0
    except stop_signals.StoppedBySignal as stop:
        traceback.clear_frames(stop.__traceback__)  # which hold data loaders, and they hold processes
        assert signals is not None, "who else raises this"
        status = signals.finish()
        sys.exit(status)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        raise
    except KeyboardInterrupt:  # outside the main thread, or with a handler of the caller's
        status = 130
        sys.exit(status)
    finally:
        if watcher is not None:
            watcher.stop(status)
        if signals is not None and found is None:
            signals.release()


def _run_to_its_end(
    main: Callable[[], object], watcher: "FailureWatcher | None", signals: stop_signals.StopSignals | None
) -> None:
    """Run ``main``; where it returns, or exits with status 0, the process groups end before the process."""
    try:
        if signals is not None:
            signals.run(watcher)
        try:
            main()
        finally:
            if signals is not None and not signals.has_stopped():
                signals.run_is_over()
    except SystemExit as end:
        if not end.code:
            traceback.clear_frames(end.__traceback__)  # which hold the model, and it holds groups
            _leave_process_groups()
        raise
    except Exception as error:
        if signals is not None and signals.has_stopped():  # torch has made another error of the stop
            sys.exit(signals.finish())
        _fail(error, watcher)
    _leave_process_groups()


def _leave_process_groups() -> None:
    """End the process groups of this process, and their threads.

    A thread that drops the last reference to a tensor needs the interpreter. One that is late, and finds it
    gone, takes the process down with a signal after all work has been done.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    distributed.destroy_process_group()
    gc.collect()  # models and optimizers hold groups, in cycles


def _watch_ranks_of_environment() -> "FailureWatcher | None":
    """A watcher where there are other ranks and the address of their store is known."""
    if not launcher.has_other_ranks():
        return None
    return watch_ranks(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))


def watch_ranks(rank: int, world_size: int) -> "FailureWatcher | None":
    """The failure watcher of this process, made at the first call.

    A program that does not run under :func:`run_main` gets one that also ends with it.

    Returns:
        None where MASTER_ADDR and MASTER_PORT give no address of a store.
    """
    # They import torch, which a single process may do later.
    from megatron.training.global_vars import get_failure_watcher, set_failure_watcher
    from megatron.training.ranks.store import StoreAddress
    from megatron.training.ranks.watcher import FailureWatcher

    if get_failure_watcher() is None:
        address = StoreAddress.of_environment(rank)
        if address is None:
            return None
        watcher = FailureWatcher(rank, world_size, address, _print_report)
        set_failure_watcher(watcher)
        atexit.register(watcher.stop)
        shown = sys.excepthook

        def fail(kind: type[BaseException], error: BaseException, traceback: Any) -> None:
            # Torch's own hook is in front of this one, and would keep what is printed for later.
            sys.stderr = sys.__stderr__
            if isinstance(error, Exception):
                _fail(error, watcher)
            watcher.stop(1)
            shown(kind, error, traceback)

        sys.excepthook = fail
        if signals := stop_signals.installed():
            signals.end_with(watcher)
    return get_failure_watcher()


def _fail(error: Exception, watcher: "FailureWatcher | None") -> None:
    readable = isinstance(error, MegatronError) and os.environ.get("MEGATRON_TRACEBACK") != "1"
    status = error.exit_status if isinstance(error, MegatronError) else 1
    if watcher is None:
        if not readable:
            raise error
        _print_alone(f"error: {_with_flags(error)}")
        sys.exit(status)
    text = _with_flags(error) if readable else "".join(traceback.format_exception(error))
    watcher.fail(_as_failure(error, status, text))


def _with_flags(error: Exception) -> str:
    """What the error says, with the flags of the config fields it names: the library knows no flags."""
    from megatron.training.arguments.spellings import with_flags  # the rows of all flags, for a failure only

    return with_flags(str(error))


def _print_alone(text: str) -> None:
    """Print an error without agreement between ranks: once per machine, if each fails for this reason."""
    sys.stdout.flush()
    if launcher.has_other_ranks():
        from megatron.training.ranks.failure import HOLD_S, FirstOnHost

        first = FirstOnHost(f"{os.getppid()} {text}")
        if not first.claim():
            return
        print(text, file=sys.stderr, flush=True)
        time.sleep(HOLD_S)
        first.release()
    else:
        print(text, file=sys.stderr, flush=True)


def _as_failure(error: Exception, status: int, text: str) -> Any:
    """An error as a ``Failure``; an error of communication counts as the consequence of another rank's."""
    from megatron.training.ranks import stack_location
    from megatron.training.ranks.failure import CONSEQUENCE, Failure
    from megatron.training.ranks.heartbeat import iteration
    from megatron.training.ranks.store import first_line

    location = stack_location.traceback_location(error.__traceback__, iteration(), detail=True)
    if isinstance(error, MegatronError) or not stack_location.raised_by_communication(error):
        return Failure(status, lambda: text, location=location._replace(waits=False))
    return Failure(status, None, CONSEQUENCE, error=first_line(error), location=location._replace(waits=True))


def _print_report(text: str, own: bool) -> None:
    """Print why all ranks end; ``own`` if the reason lies in this one."""
    sys.stdout.flush()
    headline = text.strip().splitlines()[-1] if text.startswith("Traceback") else f"error: {text}"
    launcher.write_torchrun_error(headline, _failed_at())
    where = f"[{launcher.describe()}] " if own else ""
    print(f"{where}{text if text.startswith('Traceback') else headline}", file=sys.stderr, flush=True)


def _failed_at() -> float:
    """When this rank failed, in seconds since the epoch; now, if it reports for another rank.

    Torchrun takes the earliest failure for the root cause, to the second. Other ranks end right after the
    report, which is at least a second later than the failure.
    """
    from megatron.training.global_vars import get_failure_watcher

    watcher = get_failure_watcher()
    failure = watcher.failure if watcher is not None else None
    return time.time() - (time.monotonic() - failure.at if failure is not None else 0.0)
