"""Continue a text with a trained GPT; --help lists the flags."""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))

import megatron  # before all else: says which Python is needed

if __name__ == "__main__":
    from megatron.cli.command import run

    run("generate")
else:
    from megatron.cli.generate import arguments, load_model, main
