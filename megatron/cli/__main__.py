"""``python -m megatron.cli COMMAND`` is ``megatron-npu COMMAND``, for launchers that start a module."""

import sys

from megatron.cli.command import main

if __name__ == "__main__":
    sys.exit(main())
