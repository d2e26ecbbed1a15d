"""Join the ``.bin/.idx`` data sets of a directory into one; ``--help`` lists the flags."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":
    from megatron.training import stop_signals

    stop_signals.install()  # before the imports that take long
    from megatron.training.entry import run_main
    from megatron.training.preprocessing.merge import main

    run_main(main)
