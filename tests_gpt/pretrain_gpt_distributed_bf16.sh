#!/usr/bin/env bash
# Train a GPT on this machine's device in bf16 and fused attention. --help lists options and variables.
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/launch.sh"
launch_gpt bf16 "$@"
