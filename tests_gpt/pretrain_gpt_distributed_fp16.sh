#!/usr/bin/env bash
# Train a GPT on this machine's device in fp16 with dynamic loss scaling and fused attention. --help lists options and variables.
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/launch.sh"
launch_gpt fp16 "$@"
