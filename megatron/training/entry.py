"""How an entry point ends: success, or one readable error and a non-zero exit status."""

import gc
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING

from megatron.core.errors import MegatronError
from megatron.training import launcher_environment, stop_signals
from megatron.training.output_streams import tolerate_failing_streams

if TYPE_CHECKING:
    from megatron.training.lookout import Lookout


def run_main(main: Callable[[], object]) -> None:
    """Run ``main``; print a ``MegatronError`` without a traceback and exit with its status.

    Of several ranks the lowest failing one prints, and all of them end with its status, whatever the
    launcher. ``MEGATRON_TRACEBACK=1`` keeps the traceback, for whoever debugs the program itself.
    """
    tolerate_failing_streams()
    launcher_environment.adopt()
    found = stop_signals.installed()
    signals = stop_signals.install()
    lookout = _start_lookout()
    try:
        _run_to_its_end(main, lookout, signals)
    except stop_signals.StoppedBySignal as stop:
        traceback.clear_frames(stop.__traceback__)  # which hold data loaders, and they hold processes
        sys.exit(signals.finish())
    except KeyboardInterrupt:  # outside the main thread, or with a handler of the caller's
        sys.exit(130)
    finally:
        if lookout is not None:
            lookout.stop()
        if signals is not None and found is None:
            signals.release()


def _run_to_its_end(
    main: Callable[[], object], lookout: "Lookout | None", signals: stop_signals.StopSignals | None
) -> None:
    """Run ``main``; where it returns, or exits with status 0, the process groups end before the process."""
    try:
        if signals is not None:
            signals.run(lookout)
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
        _fail(error, lookout)
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


def _start_lookout() -> "Lookout | None":
    """A lookout where there are other ranks and it is known where to meet them."""
    rank, world_size = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
    if not (rank.isdigit() and world_size.isdigit()) or int(world_size) < 2:
        return None
    if "MASTER_ADDR" not in os.environ or not os.environ.get("MASTER_PORT", "").isdigit():
        return None
    from megatron.training.lookout import Lookout  # imports torch, which a single process may do later

    return Lookout(int(rank), int(world_size))


def _fail(error: Exception, lookout: "Lookout | None") -> None:
    readable = isinstance(error, MegatronError) and os.environ.get("MEGATRON_TRACEBACK") != "1"
    status = error.exit_status if isinstance(error, MegatronError) else 1
    failed_at = time.time()
    if lookout is None:
        if not readable:
            raise error
        _print(error, "")
    elif lookout.report(status):
        launcher_environment.hand_over_failure(f"error: {error}" if readable else repr(error), failed_at)
        where = f"[{launcher_environment.describe()}] "
        if readable:
            _print(error, where)
        else:
            print(f"{where}{''.join(traceback.format_exception(error))}", file=sys.stderr, flush=True)
        lookout.printed()
    if lookout is not None:
        # Threads of the process groups wait for ranks that are gone; a regular exit could wait with them.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _print(error: Exception, where: str) -> None:
    sys.stdout.flush()
    print(f"{where}error: {error}", file=sys.stderr, flush=True)
