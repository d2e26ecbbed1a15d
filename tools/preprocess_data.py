"""Tokenize text into the ``.bin/.idx`` files that training reads; ``--help`` lists the flags."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# The worker processes are the parallelism; threads that libraries add would fight over the cores.
for _variable in ("RAYON_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Some tokenizers import torch; none needs a device.
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")

if __name__ == "__main__":
    from megatron.training import stop_signals

    stop_signals.install()  # before the imports that take long
    from megatron.training.entry import run_main
    from megatron.training.preprocessing.command import main

    run_main(main)
