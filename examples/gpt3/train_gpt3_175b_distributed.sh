#!/usr/bin/env bash
# GPT-3 175B: 96 layers of width 12288, on 128 devices as published (tensor 8, pipeline 16), or on fewer.
#
#   bash examples/gpt3/train_gpt3_175b_distributed.sh CHECKPOINTS TENSORBOARD VOCAB MERGES DATA [flags ...]
#   bash examples/gpt3/train_gpt3_175b_distributed.sh CHECKPOINTS VOCAB MERGES DATA [flags ...]
#   DATA_PATH=... bash examples/gpt3/train_gpt3_175b_distributed.sh CHECKPOINTS TENSORBOARD VOCAB MERGES [flags ...]
#
# VOCAB and MERGES are the GPT-2 files, or the directories that hold gpt2-vocab.json and gpt2-merges.txt.
# DATA is the prefix of a .bin/.idx pair, or a quoted blend "0.3 A 0.7 B". Flags of pretrain_gpt.py win over
# those below. From the environment: GPUS_PER_NODE (8), NUM_NODES (1), NODE_RANK (0), MASTER_ADDR,
# MASTER_PORT, MEGATRON_DEVICE, PYTHON, and the sizes NUM_LAYERS, HIDDEN_SIZE, NUM_HEADS, SEQ_LENGTH,
# GLOBAL_BATCH, TRAIN_ITERS for a trial.
set -eo pipefail
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/../../tests_gpt/launch.sh"

# paths WORDS...: sets CHECKPOINTS, TENSORBOARD, VOCAB, MERGES, DATA and the array FLAGS.
paths() {
    local given=()
    while (($#)) && [[ $1 != -* ]]; do
        given+=("$1")
        shift
    done
    FLAGS=("$@") TENSORBOARD='' DATA=$DATA_PATH
    case ${#given[@]} in
        5)
            CHECKPOINTS=${given[0]} TENSORBOARD=${given[1]} VOCAB=${given[2]} MERGES=${given[3]} DATA=${given[4]}
            ;;
        4)
            if [[ -n $DATA_PATH ]]; then
                CHECKPOINTS=${given[0]} TENSORBOARD=${given[1]} VOCAB=${given[2]} MERGES=${given[3]}
            else
                CHECKPOINTS=${given[0]} VOCAB=${given[1]} MERGES=${given[2]} DATA=${given[3]}
            fi
            ;;
        *)
            die "${#given[@]} paths before the first flag, where 4 or 5 are needed: CHECKPOINTS [TENSORBOARD]" \
                "VOCAB MERGES DATA. Quote a path or a blend with a blank: \"0.3 A 0.7 B\""
            ;;
    esac
    if [[ -d $VOCAB ]]; then VOCAB=$VOCAB/gpt2-vocab.json; fi
    if [[ -d $MERGES ]]; then MERGES=$MERGES/gpt2-merges.txt; fi
}

# common_divisor A B: prints the greatest number that divides both.
common_divisor() {
    local a=$1 b=$2 rest
    while ((b)); do
        rest=$((a % b)) a=$b b=$rest
    done
    echo "$a"
}

paths "$@"
find_python
export PYTHONPATH="$REPO${PYTHONPATH:+:$PYTHONPATH}"
find_device
NNODES=${NUM_NODES:-${NNODES:-1}} GPUS_PER_NODE=${GPUS_PER_NODE:-8}
count_processes

# As many ranks share a layer, and as many stages the layers, as the published 8 and 16 allow here.
TENSOR=$(common_divisor 8 "$PROCESSES")
PIPELINE=$(common_divisor 16 $((WORLD / TENSOR)))
split_data_path "$DATA"
GPT_FLAGS=(
    --num-layers "${NUM_LAYERS:-96}" --hidden-size "${HIDDEN_SIZE:-12288}"
    --num-attention-heads "${NUM_HEADS:-96}"
    --seq-length "${SEQ_LENGTH:-2048}" --max-position-embeddings "${SEQ_LENGTH:-2048}"
    --attention-backend auto
    --micro-batch-size 1 --global-batch-size "${GLOBAL_BATCH:-1536}" --train-iters "${TRAIN_ITERS:-500000}"
    --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --init-method-std 0.006 --clip-grad 1.0 --fp16
    --lr 6.0e-5 --lr-decay-style cosine --min-lr 6.0e-6 --lr-warmup-fraction .001
    --tensor-model-parallel-size "$TENSOR" --pipeline-model-parallel-size "$PIPELINE"
    --data-path "${DATA_WORDS[@]}" --vocab-file "$VOCAB" --merge-file "$MERGES" --split 949,50,1
    --log-interval 100 --save-interval 10000 --eval-interval 1000 --eval-iters 10
    --save "$CHECKPOINTS" --load "$CHECKPOINTS"
)
if [[ -z $TRAIN_ITERS ]]; then GPT_FLAGS+=(--lr-decay-iters 430000); fi
if [[ -n $TENSORBOARD ]]; then GPT_FLAGS+=(--tensorboard-dir "$TENSORBOARD"); fi
say "device $DEVICE, $WORLD process(es): tensor $TENSOR, pipeline $PIPELINE, data $((WORLD / TENSOR / PIPELINE))"
start_python "$REPO/pretrain_gpt.py" "${GPT_FLAGS[@]}" "${FLAGS[@]}"
exec "${COMMAND[@]}"
