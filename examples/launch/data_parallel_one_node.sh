#!/usr/bin/env bash
# Data parallel on one node: NPROC_PER_NODE processes (8), each with the whole model.
#
#   DATA_PATH=data/corpus_text_document CKPT_PATH=checkpoints/gpt bash examples/launch/data_parallel_one_node.sh
#
# Further flags of pretrain_gpt.py can be added to the line; model.sh lists the variables.
set -eo pipefail
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/model.sh"
gpt_flags

exec "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "${NPROC_PER_NODE:-8}" \
    "$REPO/pretrain_gpt.py" "${GPT_FLAGS[@]}" --bf16 --use-distributed-optimizer "$@"
