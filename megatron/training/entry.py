"""How an entry point ends: success, or one readable error and a non-zero exit status."""

import os
import sys
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING

from megatron.core.errors import MegatronError
from megatron.training import launcher_environment

if TYPE_CHECKING:
    from megatron.training.lookout import Lookout


def run_main(main: Callable[[], object]) -> None:
    """Run ``main``; print a ``MegatronError`` without a traceback and exit with its status.

    Of several ranks the lowest failing one prints, and all of them end with its status, whatever the
    launcher. ``MEGATRON_TRACEBACK=1`` keeps the traceback, for whoever debugs the program itself.
    """
    launcher_environment.adopt()
    lookout = _start_lookout()
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        _fail(error, lookout)
    finally:
        if lookout is not None:
            lookout.stop()


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
    if lookout is None:
        if not readable:
            raise error
        _print(error, "")
    elif lookout.report(status):
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
