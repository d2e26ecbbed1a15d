"""How an entry point ends: success, or one readable error and a non-zero exit status."""

import os
import sys
from collections.abc import Callable

from megatron.core.errors import MegatronError


def run_main(main: Callable[[], object]) -> None:
    """Run ``main``; print a ``MegatronError`` without a traceback and exit with its status.

    ``MEGATRON_TRACEBACK=1`` keeps the traceback, for whoever debugs the program itself.
    """
    try:
        main()
    except MegatronError as error:
        if os.environ.get("MEGATRON_TRACEBACK") == "1":
            raise
        sys.stdout.flush()
        rank = os.environ.get("RANK", "0")
        where = f"[rank {rank}] " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
        print(f"{where}error: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_status)
    except KeyboardInterrupt:
        sys.exit(130)
