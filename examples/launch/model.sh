# The model, the data and the length of the run, for the launch scripts beside this file, which source it.
# Every size and path can be set through the environment; nothing needs an edit.

# gpt_flags: sets the array GPT_FLAGS.
gpt_flags() {
    if [[ -z $DATA_PATH ]]; then
        echo "DATA_PATH is not set: name the prefix of a .bin/.idx pair, for instance DATA_PATH=data/corpus_text_document" >&2
        return 2
    fi
    local data=("$DATA_PATH") # one path, blanks included, or the words of a blend
    if [[ ! -e $DATA_PATH.bin ]]; then read -ra data <<<"$DATA_PATH"; fi
    GPT_FLAGS=(
        --num-layers "${NUM_LAYERS:-8}"
        --hidden-size "${HIDDEN_SIZE:-4096}"
        --num-attention-heads "${NUM_HEADS:-32}"
        --seq-length "${SEQ_LENGTH:-4096}"
        --max-position-embeddings "${SEQ_LENGTH:-4096}"
        --micro-batch-size "${MICRO_BATCH:-1}"
        --global-batch-size "${GLOBAL_BATCH:-64}"
        --train-iters "${TRAIN_ITERS:-500000}"
        --lr "${LR:-1.5e-4}" --min-lr 1.0e-5 --lr-decay-style cosine --lr-warmup-fraction 0.01
        --weight-decay 0.01 --clip-grad 1.0 --adam-beta2 0.95 --init-method-std 0.006
        --data-path "${data[@]}"
        --split 949,50,1
        --log-interval "${LOG_INTERVAL:-10}" --eval-interval 1000 --eval-iters "${EVAL_ITERS:-10}"
        --save-interval "${SAVE_INTERVAL:-1000}"
        --distributed-backend nccl # this machine's own: nccl, hccl or gloo
    )
    if [[ -n $VOCAB_FILE ]]; then
        GPT_FLAGS+=(--vocab-file "$VOCAB_FILE" --merge-file "$MERGE_FILE")
    else
        GPT_FLAGS+=(--tokenizer-type NullTokenizer --vocab-size "${VOCAB_SIZE:-50256}")
    fi
    if [[ -n $CACHE_PATH ]]; then
        GPT_FLAGS+=(--data-cache-path "$CACHE_PATH")
    fi
    if [[ -n $CKPT_PATH ]]; then
        GPT_FLAGS+=(--save "$CKPT_PATH" --load "$CKPT_PATH")
    fi
}

LAUNCH_DIR=$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")
REPO=${LAUNCH_DIR%/examples/launch}
PYTHON=${PYTHON:-python3}
export PYTHONPATH="$REPO${PYTHONPATH:+:$PYTHONPATH}"
# Kernels of one stream are sent in order, so that communication starts before the compute it overlaps with.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
