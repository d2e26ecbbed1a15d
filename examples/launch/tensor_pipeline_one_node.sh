#!/usr/bin/env bash
# Tensor parallel 2 x pipeline parallel 2 with one layer per virtual stage, in fp16, on one node of
# NPROC_PER_NODE processes (8, a multiple of 4; the rest is data parallel).
#
#   DATA_PATH=data/corpus_text_document bash examples/launch/tensor_pipeline_one_node.sh
set -eo pipefail
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/model.sh"
gpt_flags

exec "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "${NPROC_PER_NODE:-8}" \
    "$REPO/pretrain_gpt.py" "${GPT_FLAGS[@]}" --fp16 \
    --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 \
    --num-layers-per-virtual-pipeline-stage 1 "$@"
