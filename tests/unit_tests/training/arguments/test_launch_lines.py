"""Launch lines of published scripts run unchanged, once they ask for one process."""

import pytest

from megatron.training.arguments import core_transformer_config_from_args

COMMON = (
    "--data-path ../dataset/enwiki/my-t5_text_sentence --vocab-file gpt2-vocab.json "
    "--merge-file gpt2-merges.txt "
    "--data-impl mmap --split 949,50,1 --distributed-backend nccl --lr 0.375e-5 --lr-decay-style cosine "
    "--min-lr 0.375e-6 --weight-decay 0.1 --clip-grad 1.0 --lr-warmup-fraction .01 --adam-beta1 0.9 "
    "--adam-beta2 0.95 --init-method-std 0.006 --no-gradient-accumulation-fusion --log-interval 1 "
    "--eval-interval 1000 --train-iters 500000 --lr-decay-iters 320000 --save-interval 10000 --eval-iters 10 "
    "--save ./checkpoint_dist --load ./checkpoint_dist"
)
FLASH = "--use-flash-attn --pre-tockens 65536 --next-tockens 65536 --shape-order SBH --sequence-parallel"
GPT = "--num-layers 8 --hidden-size 5120 --num-attention-heads 40 --seq-length 8192"
GPT += " --max-position-embeddings 8192 --micro-batch-size 2 --global-batch-size 2"
X_MODEL = "--is-x-model --seq-length 8192 --max-position-embeddings 8192 --num-layers 32 --hidden-size 2560"
X_MODEL += (
    " --num-attention-heads 32 --micro-batch-size 2 --global-batch-size 24 --ffn-hidden-size 13664 --bf16"
)
SPARSE = FLASH.replace("65536 --next-tockens 65536", "2048 --next-tockens 0")
LINES = {
    "tests_gpt": (
        "--num-layers 8 --hidden-size 12288 --num-attention-heads 96 --seq-length 1024 "
        "--max-position-embeddings 1024 --micro-batch-size 4 --global-batch-size 96 --fp16 "
        "--recompute-granularity full --recompute-method uniform"
    ),
    "tests_gpt_fp16": f"{GPT} --fp16 {FLASH}",
    "tests_gpt_bf16": f"{GPT} --bf16 {FLASH}",
    "tests_gpt_sparse": f"{GPT} --bf16 {SPARSE}",
    "tests_gpt_sparse_bsh": f"{GPT} --fp16 {SPARSE.replace('SBH', 'BSH')}",
    "examples_110b": (
        "--num-layers 80 --hidden-size 10240 --num-attention-heads 80 --seq-length 4096 "
        "--max-position-embeddings 4096 --micro-batch-size 1 --global-batch-size 192 --bf16 --use-flash-attn "
        "--vocab-size 64000 --make-vocab-size-divisible-by 64 --attention-dropout 0.0 --pre-tockens 65536 "
        "--next-tockens 0 --shape-order SBH --reset-attention-mask --sequence-parallel"
    ),
    "x1_2.6b": f"{X_MODEL} {FLASH}",
    "x1_13b": f"{X_MODEL} {FLASH} --recompute-granularity full --recompute-method uniform",
}


@pytest.mark.parametrize("name", LINES)
def test_launch_line(name: str, check) -> None:
    defaults = {"tokenizer_type": "GPT2BPETokenizer"}
    args = check(f"--local_rank=0 {LINES[name]} {COMMON}", base="", defaults=defaults)
    config = core_transformer_config_from_args(args)
    assert args.tokenizer_type == "GPT2BPETokenizer"
    assert config.window_size == ((2048, 0) if "sparse" in name else None)
    assert config.attention_layout == ("BSH" if name.endswith("bsh") else "SBH")
    if name.startswith("x1"):
        assert config.glu_gate_last and config.gated_linear_unit and config.ffn_hidden_size == 6832
    if "--recompute-granularity" in LINES[name]:
        assert (config.recompute_granularity, config.recompute_num_layers) == ("full", 1)


def test_a_stray_backslash_of_a_quoted_line(check) -> None:
    words = [
        "--num-layers",
        "24",
        "--hidden-size",
        "1024",
        "\\",
        "--num-attention-heads",
        "16",
        "--seq-length",
        "1024",
    ]
    words += ["--max-position-embeddings", "1024", "--micro-batch-size", "2", "--transformer-impl", "local"]
    assert check(words, base="").hidden_size == 1024
