#!/usr/bin/env bash
# Several nodes with torchrun: start this on every node, with the same MASTER_ADDR (the first node) and with
# NODE_RANK 0, 1, ... of its own.
#
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 DATA_PATH=data/corpus bash examples/launch/torchrun_many_nodes.sh
#   NNODES=2 NODE_RANK=1 MASTER_ADDR=node0 DATA_PATH=data/corpus bash examples/launch/torchrun_many_nodes.sh
#
# The nodes may share their storage or not: they find out. Without shared storage each needs a copy of the data.
set -eo pipefail
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/model.sh"
gpt_flags
: "${NODE_RANK:?number this node, from 0}" "${MASTER_ADDR:?name the node with NODE_RANK=0}"

exec "$PYTHON" -m torch.distributed.run --nnodes "${NNODES:-2}" --nproc-per-node "${NPROC_PER_NODE:-8}" \
    --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-6000}" \
    "$REPO/pretrain_gpt.py" "${GPT_FLAGS[@]}" --bf16 --use-distributed-optimizer \
    --tensor-model-parallel-size "${TP:-1}" --pipeline-model-parallel-size "${PP:-1}" "$@"
