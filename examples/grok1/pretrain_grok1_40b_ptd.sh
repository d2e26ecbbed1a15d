#!/usr/bin/env bash
# Grok-1 cut to 8 layers (41 billion parameters), with the flags that ModelLink published for 16 devices.
#
#   DATA_PATH=grok_text_document TOKENIZER_MODEL=DIRECTORY bash examples/grok1/pretrain_grok1_40b_ptd.sh [flags ...]
#
# DATA_PATH is the prefix of a .bin/.idx pair, or a blend "0.3 A 0.7 B"; TOKENIZER_MODEL the directory with the
# tokenizer's files. Flags of pretrain_gpt.py win over those below. Optional in the environment: SAVE_PATH,
# LOAD_PATH, RELEASE (2024, or 2.2.0 for MindSpeed-LLM's script of 12 layers on 32 devices), GPUS_PER_NODE,
# NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT, MEGATRON_DEVICE, PYTHON, TP, PP, EP, and the sizes NUM_LAYERS,
# HIDDEN_SIZE, FFN_HIDDEN_SIZE, NUM_HEADS, NUM_QUERY_GROUPS, SEQ_LENGTH, GLOBAL_BATCH, TRAIN_ITERS, LR, SPLIT.
set -eo pipefail
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/../../tests_gpt/launch.sh"

RELEASE=${RELEASE:-2024}
[[ $RELEASE == 2024 || $RELEASE == 2.2.0 ]] || die "RELEASE=$RELEASE: 2024 or 2.2.0 is needed"
[[ -n $DATA_PATH ]] || die "DATA_PATH is not set: the prefix of the data, from tools/preprocess_data.py"
[[ -n $TOKENIZER_MODEL ]] || die "TOKENIZER_MODEL is not set: the directory with the tokenizer's files"
find_python
export PYTHONPATH="$REPO${PYTHONPATH:+:$PYTHONPATH}"
find_device
if [[ $RELEASE == 2024 ]]; then
    NNODES=${NNODES:-2} TP=${TP:-4} NUM_LAYERS=${NUM_LAYERS:-8} TRAIN_ITERS=${TRAIN_ITERS:-5000}
else
    NNODES=${NNODES:-4} TP=${TP:-8} NUM_LAYERS=${NUM_LAYERS:-12} TRAIN_ITERS=${TRAIN_ITERS:-2000}
fi
PP=${PP:-2} EP=${EP:-2} GPUS_PER_NODE=${GPUS_PER_NODE:-8}
count_processes
split_data_path "$DATA_PATH"

MODEL=(
    --use-mcore-models --disable-bias-linear --transformer-impl local
    --num-layers "$NUM_LAYERS" --hidden-size "${HIDDEN_SIZE:-6144}"
    --ffn-hidden-size "${FFN_HIDDEN_SIZE:-32768}" --num-attention-heads "${NUM_HEADS:-48}"
    --group-query-attention --num-query-groups "${NUM_QUERY_GROUPS:-8}"
    --seq-length "${SEQ_LENGTH:-8192}" --max-position-embeddings "${SEQ_LENGTH:-8192}"
    --attention-dropout 0.0 --hidden-dropout 0.0 --normalization RMSNorm --use-fused-rmsnorm --post-norm
    --position-embedding-type rope --swiglu --use-fused-swiglu --use-flash-attn
    --untie-embeddings-and-output-weights --vocab-size 131072
    --embedding-multiplier-scale 78.38367176906169 --output-multiplier-scale 0.5773502691896257
)
EXPERTS=(
    --num-experts 8 --expert-model-parallel-size "$EP" --moe-router-topk 2
    --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2 --input-jitter
    --moe-permutation-async-comm
)
DATA_AND_TOKENIZER=(
    --tokenizer-type PretrainedFromHF --tokenizer-name-or-path "$TOKENIZER_MODEL"
    --data-path "${DATA_WORDS[@]}"
)
TRAINING=(
    --micro-batch-size 1 --global-batch-size "${GLOBAL_BATCH:-128}" --train-iters "$TRAIN_ITERS"
    --lr "${LR:-1e-5}" --min-lr 1.0e-6 --lr-decay-style cosine --lr-decay-iters 1280 --lr-warmup-iters 2
    --weight-decay 0.1 --clip-grad 1.0 --bf16 --use-distributed-optimizer --use-mc2
    --no-rope-fusion --no-bias-dropout-fusion --no-bias-swiglu-fusion
    --tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP" --sequence-parallel
    --log-interval 1 --no-load-optim --no-load-rng
)
if [[ $RELEASE == 2024 ]]; then
    MODEL+=(--init-method-std 0.01)
    DATA_AND_TOKENIZER+=(--split "${SPLIT:-99990,8,2}")
    TRAINING+=(
        --no-gradient-accumulation-fusion --save-interval 5000 --eval-interval 5000 --eval-iters 100
    )
else
    MODEL+=(
        --spec mindspeed_llm.tasks.models.spec.grok_spec layer_spec
        --init-method-std 0.02 --make-vocab-size-divisible-by 1
        --use-fused-rotary-pos-emb --use-rotary-position-embeddings --rotary-base 10000
        --no-masked-softmax-fusion --attention-softmax-in-fp32
    )
    EXPERTS+=(
        --moe-token-dispatcher-type alltoall_seq --moe-grouped-gemm --moe-permute-fusion
        --moe-layer-freq -1 --first-k-dense-replace -1
    )
    DATA_AND_TOKENIZER+=(--split "${SPLIT:-949,50,1}" --no-shared-storage)
    TRAINING+=(
        --context-parallel-size 1 --context-parallel-algo ulysses_cp_algo --gemm-gradient-accumulation-fusion --reuse-fp32-param
        --save-interval 2000 --eval-interval 2000 --eval-iters 0 --no-save-optim --no-save-rng
        --seed 1234 --distributed-backend nccl
    )
    if ((PP > 1)); then TRAINING+=(--num-layers-per-virtual-pipeline-stage 1); fi
fi
PLACES=()
if [[ -n $SAVE_PATH ]]; then PLACES+=(--save "$SAVE_PATH"); fi
if [[ -n $LOAD_PATH ]]; then PLACES+=(--load "$LOAD_PATH"); fi
say "device $DEVICE, $WORLD process(es): tensor $TP, pipeline $PP, experts over $EP, release $RELEASE"
start_python "$REPO/pretrain_gpt.py" "${MODEL[@]}" "${EXPERTS[@]}" "${DATA_AND_TOKENIZER[@]}" \
    "${TRAINING[@]}" "${PLACES[@]}" "$@"
exec "${COMMAND[@]}"
