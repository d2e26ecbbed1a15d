# What the pretrain_gpt_distributed*.sh scripts train: the published model on an accelerator, a small one
# of the same kind on a CPU, or what MEGATRON_RECIPE_SIZE says. Sourced by launch.sh.

# recipe_flags plain|fp16|bf16: sets the array RECIPE_FLAGS from DEVICE, EMBEDDED, PROCESSES and WORLD.
recipe_flags() {
    RECIPE_FLAGS=(
        --weight-decay 0.1 --clip-grad 1.0 --adam-beta1 0.9 --adam-beta2 0.95
        --lr-decay-style cosine
        --distributed-backend nccl --no-gradient-accumulation-fusion
    )
    local size=published
    if [[ $DEVICE == cpu || $DEVICE == mps ]]; then size=small; fi
    case ${MEGATRON_RECIPE_SIZE:-$size} in
        small) small_model "$1" ;;
        published)
            published_model
            if [[ $EMBEDDED == 1 ]]; then first_try_schedule; else published_schedule; fi
            ;;
        *) die "MEGATRON_RECIPE_SIZE=$MEGATRON_RECIPE_SIZE: small or published is needed" ;;
    esac
    case $1 in
        plain) RECIPE_FLAGS+=(--fp16 --recompute-granularity full --recompute-method uniform) ;;
        fp16) RECIPE_FLAGS+=(--fp16 --use-flash-attn) ;;
        bf16) RECIPE_FLAGS+=(--bf16 --use-flash-attn) ;;
    esac
}

# 8 layers of width 5120 (2.8 billion parameters with GPT-2's vocabulary), sequences of 8192.
published_model() {
    RECIPE_FLAGS+=(
        --num-layers 8 --hidden-size 5120 --num-attention-heads 40
        --seq-length 8192 --max-position-embeddings 8192
        --micro-batch-size 2 --init-method-std 0.006
    )
    # A node's devices share each layer: the published scripts ask for 8 and take what there is.
    local tensor
    for tensor in 8 4 2 1; do
        if ((PROCESSES % tensor == 0)); then break; fi
    done
    RECIPE_FLAGS+=(--tensor-model-parallel-size "$tensor")
    # Several processes make the batch larger where they are more than share a layer: 2 sequences each.
    if ((WORLD == 1)); then RECIPE_FLAGS+=(--global-batch-size 2); fi
}

published_schedule() {
    RECIPE_FLAGS+=(
        --train-iters 500000 --lr-decay-iters 320000 --lr 0.375e-5 --min-lr 0.375e-6 --lr-warmup-fraction .01
        --split 949,50,1 --log-interval 1 --save-interval 10000 --eval-interval 1000 --eval-iters 10
    )
}

# The default corpus has 3 million tokens, 180 steps of the published model: a first try must end, learn
# something at a rate for so few steps, and not leave 30 GB of optimizer state behind.
first_try_schedule() {
    RECIPE_FLAGS+=(
        --train-iters 200 --lr-decay-iters 200 --lr 1.5e-4 --min-lr 1.5e-5 --lr-warmup-fraction .1
        --split 949,50,1 --log-interval 1 --save-interval 10000 --eval-interval 100 --eval-iters 4
        --no-save-optim
    )
}

# A model and a schedule that end within two minutes on two cores. Measured there on the default corpus:
# small batches and many steps learn the most per second, and larger rates than 1e-3 learn less.
# Argument: the recipe, as for recipe_flags.
small_model() {
    RECIPE_FLAGS+=(
        --num-layers 4 --hidden-size 256 --num-attention-heads 4
        --seq-length 256 --max-position-embeddings 256
        --micro-batch-size 4 --init-method-std 0.02
        --attention-dropout 0 --hidden-dropout 0
        --train-iters 200 --lr-decay-iters 200 --lr 1e-3 --min-lr 1e-4 --lr-warmup-fraction .1
        --split 949,50,1 --log-interval 20 --save-interval 1000 --eval-interval 100 --eval-iters 10
    )
    # Several processes make the batch larger: one micro-batch each.
    if ((WORLD == 1)); then RECIPE_FLAGS+=(--global-batch-size 4); fi
}
