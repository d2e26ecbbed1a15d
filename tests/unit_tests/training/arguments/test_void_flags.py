"""A flag that changes nothing, always or in its company, is named with the reason."""

import pytest

from megatron.training.arguments.flags import flags_by_name
from megatron.training.arguments.savings import lost_saving

ROPE = "--position-embedding-type rope"
# Words, the flag among them that does nothing, and part of the reason.
VOID = [
    ("--no-persist-layer-norm", "--no-persist-layer-norm", "no persistent kernel"),
    (f"{ROPE} --no-rope-fusion", "--no-rope-fusion", "--disable-override rotary"),
    ("--no-bias-dropout-fusion", "--no-bias-dropout-fusion", "--disable-override bias_dropout_add"),
    ("--swiglu --no-bias-swiglu-fusion", "--no-bias-swiglu-fusion", "--disable-override swiglu"),
    ("--auto-detect-ckpt-format", "--auto-detect-ckpt-format", "always read from its directory"),
    ("--no-ckpt-fully-parallel-save", "--no-ckpt-fully-parallel-save", "data-parallel rank 0"),
    ("--ckpt-fully-parallel-load", "--ckpt-fully-parallel-load", "its own file"),
    ("--attention-mask-type general", "--attention-mask-type", "--context-parallel-size"),
    ("--cross-entropy-loss-fusion", "--cross-entropy-loss-fusion", "always computed in its fused form"),
    ("--next-tockens 3", "--next-tockens", "nothing after the query"),
    ("--pre-tockens 31", "--pre-tockens", "covers the whole sequence"),
    ("--swiglu --openai-gelu", "--openai-gelu", "no GELU"),
    ("--swiglu --no-bias-gelu-fusion", "--no-bias-gelu-fusion", "a GELU with a bias"),
    ("--disable-bias-linear --no-bias-gelu-fusion", "--no-bias-gelu-fusion", "a GELU with a bias"),
    ("--add-qkv-bias", "--add-qkv-bias", "--disable-bias-linear"),
    (f"{ROPE} --no-position-embedding", "--no-position-embedding", "no table"),
    (f"{ROPE} --reset-position-ids", "--reset-position-ids", "takes no position ids"),
    ("--position-embedding-type none --reset-position-ids", "--reset-position-ids", "takes no position ids"),
    (
        "--reset-attention-mask --no-create-attention-mask-in-dataloader",
        "--reset-attention-mask",
        "--no-create-attention-mask-in-dataloader leaves the mask out",
    ),
    (
        "--no-create-attention-mask-in-dataloader",
        "--no-create-attention-mask-in-dataloader",
        "without --reset-attention-mask",
    ),
    ("--no-masked-softmax-fusion", "--no-masked-softmax-fusion", "--attention-backend unfused"),
    (
        "--bf16 --attention-softmax-in-fp32",
        "--attention-softmax-in-fp32",
        "--attention-backend unfused",
    ),
    (
        "--attention-backend unfused --attention-softmax-in-fp32",
        "--attention-softmax-in-fp32",
        "in fp32 anyway",
    ),
    ("--accumulate-allreduce-grads-in-fp32", "--accumulate-allreduce-grads-in-fp32", "in fp32 anyway"),
    (
        "--bf16 --grad-reduce-in-bf16 --accumulate-allreduce-grads-in-fp32",
        "--accumulate-allreduce-grads-in-fp32",
        "gives way to --grad-reduce-in-bf16",
    ),
    ("--init-method-xavier-uniform --init-method-std 0.1", "--init-method-std", "--init-method-xavier"),
    ("--lr-decay-style constant --min-lr 1e-5", "--min-lr", "--lr-decay-style constant"),
    ("--lr-decay-style constant --lr-decay-iters 9", "--lr-decay-iters", "--lr-decay-style constant"),
    (
        "--weight-decay-incr-style linear --start-weight-decay 0.1 --end-weight-decay 0.2 --weight-decay 0.3",
        "--weight-decay",
        "take its place",
    ),
    ("--exit-duration-in-mins 0", "--exit-duration-in-mins", "0 sets no limit"),
    ("--exit-interval 0", "--exit-interval", "0 sets no limit"),
    ("--iterations-to-skip 20 -1", "--iterations-to-skip", "no such iteration"),
    ("--eval-iters 0 --eval-interval 5", "--eval-interval", "--eval-iters 0"),
    ("--finetune", "--finetune", "--load"),
    ("--load x --finetune --no-load-optim", "--no-load-optim", "--finetune"),
    ("--load x --finetune --no-load-rng", "--no-load-rng", "--finetune"),
    ("--override-opt_param-scheduler", "--override-opt_param-scheduler", "--load"),
    (
        "--load x --no-load-optim --use-checkpoint-opt_param-scheduler",
        "--use-checkpoint-opt_param-scheduler",
        "--no-load-optim",
    ),
    ("--use-mp-args-from-checkpoint-args", "--use-mp-args-from-checkpoint-args", "--use-checkpoint-args"),
    ("--persistent-save-interval 5", "--persistent-save-interval", "--save"),
    ("--cp-comm-type a2a", "--cp-comm-type", "--context-parallel-size 2 or more"),
    ("--context-parallel-algo ulysses_cp_algo", "--context-parallel-algo", "--context-parallel-size"),
    ("--no-overlap-p2p-communication", "--no-overlap-p2p-communication", "virtual pipeline stages"),
    ("--account-for-loss-in-pipeline-split", "--account-for-loss-in-pipeline-split", "--pipeline-model"),
    ("--use-tp-pp-dp-mapping", "--use-tp-pp-dp-mapping", "several pipeline stages"),
    ("--overlap-grad-reduce", "--overlap-grad-reduce", "several data-parallel ranks"),
    ("--ddp-num-buckets 4", "--ddp-num-buckets", "several data-parallel ranks"),
    ("--data-parallel-random-init", "--data-parallel-random-init", "several data-parallel ranks"),
    ("--no-shared-storage", "--no-shared-storage", "several hosts"),
    ("--expert-tensor-parallel-size 1", "--expert-tensor-parallel-size", "--num-experts"),
    ("--mock-data --split 9,1", "--split", "mock data"),
    ("--mock-data --data-cache-path x", "--data-cache-path", "mock data"),
    ("--tokenizer-type NullTokenizer --vocab-size 9 --merge-file x", "--merge-file", "GPT2BPETokenizer"),
    ("--tokenizer-type NullTokenizer --vocab-size 9 --tokenizer-model x", "--tokenizer-model", "no model"),
    ("--tokenizer-type NullTokenizer --vocab-size 9 --tiktoken-pattern v2", "--tiktoken-pattern", "Tik"),
    ("--profile --profile-step-start 20 --profile-step-end 30", "--profile", "the run ends before"),
    ("--profile --profile-ranks 3", "--profile-ranks", "none of these ranks"),
    ("--no-barrier-with-level-1-timing", "--no-barrier-with-level-1-timing", "--timing-log-level"),
    ("--rendezvous-timeout 30", "--rendezvous-timeout", "other ranks"),
    ("--straggler-minmax-count 3", "--straggler-minmax-count", "--log-straggler"),
    ("--spec local --transformer-impl local", "--transformer-impl", "--spec"),
    ("--empty-unused-memory-level 1", "--empty-unused-memory-level", "a CPU"),
    (
        "--recompute-granularity full --recompute-method uniform --recompute-modules mlp",
        "--recompute-modules",
        "whole layers",
    ),
]


@pytest.mark.parametrize(("words", "flag", "reason"), VOID)
def test_a_void_flag_is_named_once_with_the_reason(words, flag, reason, check, capsys, monkeypatch) -> None:
    monkeypatch.setenv("MEGATRON_DEVICE", "cpu")
    check(words)
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if line.startswith(f"WARNING: {flag} has no effect")]
    assert reason in line


# Company in which flags of the list above do act.
ACTS = [
    "--add-qkv-bias --disable-bias-linear --is-x-model --ffn-hidden-size 64",
    "--no-bias-gelu-fusion",
    "--attention-backend local --bf16 --attention-softmax-in-fp32 --no-masked-softmax-fusion "
    "--apply-query-key-layer-scaling --accumulate-allreduce-grads-in-fp32",
    "--reset-attention-mask --reset-position-ids",
    "--lr-decay-style constant --lr-warmup-fraction 0.5 --lr-decay-iters 9",
    "--lr-decay-style cosine --min-lr 1e-5 --lr-decay-iters 9",
    "--exit-interval 3 --exit-duration-in-mins 1 --iterations-to-skip 19 99",
    "--load x --finetune --ckpt-step 3",
    "--pretrained-checkpoint x --finetune",
    "--load x --no-load-optim --no-load-rng",
    "--save x --persistent-save-interval 5 --no-save-rng",
    "--data-path x --split 9,1 --data-cache-path y --num-dataset-builder-threads 2",
    "--pre-tockens 30",
    f"{ROPE} --rotary-interleaved --no-rope-fusion",
    "--profile --profile-step-start 19 --profile-step-end 20 --profile-ranks 0 3",
]


@pytest.mark.parametrize("words", ACTS)
def test_a_flag_that_acts_is_not_named(words: str, check, capsys) -> None:
    check(words)
    assert "has no effect" not in capsys.readouterr().out


def test_parallel_flags_act_over_ranks(check, capsys, monkeypatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    for name, word in (("WORLD_SIZE", "8"), ("MASTER_ADDR", "h"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, word)
    check(
        "--pipeline-model-parallel-size 2 --context-parallel-size 2 --cp-comm-type a2a --overlap-grad-reduce "
        "--no-align-grad-reduce --ddp-num-buckets 3 --use-tp-pp-dp-mapping --expert-tensor-parallel-size 2 "
        "--data-parallel-random-init "
        "--no-shared-storage --data-path x --split 9,1"
    )
    assert "has no effect" not in capsys.readouterr().out


def test_flags_that_never_work_need_no_condition_for_it() -> None:
    """But three that print a notice, whose effect depends on their company nevertheless."""
    idle = {flag.name for flag in flags_by_name().values() if flag.no_effect and not flag.works}
    assert idle == {"--openai-gelu", "--use-ascend-coc", "--use-ascend-mc2"}


# hidden 64, 4 heads of 16, MLP 256, 2 layers, 2 sequences of 32 tokens, worked out by hand.
LINEAR = 2 * (4 * 64 * 64 + 2 * 64 * 256)
POSITIONS = 2 * 2 * 32
SAVED = [
    ("--bf16 --reuse-fp32-param", "--reuse-fp32-param", 2 * LINEAR),
    ("--fp8-param-gather --bf16", "--fp8-param-gather", LINEAR),
    ("--swap-attention", "--swap-attention", POSITIONS * 4 * 64 * 4),
    ("--swap-attention --bf16", "--swap-attention", POSITIONS * 4 * 64 * 2),
    ("--recompute-activation-function --bf16", "--recompute-activation-function", POSITIONS * 256 * 2),
    ("--fp8-format hybrid --bf16", "--fp8-format", POSITIONS * (2 * 64 + 64 + 256)),
]


@pytest.mark.parametrize(("words", "flag", "expected"), SAVED)
def test_a_memory_saver_that_is_not_built_says_what_it_would_have_saved(
    words: str, flag: str, expected: int, check, capsys
) -> None:
    check(words)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith(f"notice: {flag}:")]
    number = float(line.partition("not saved: about ")[2].partition(" MiB per rank")[0])
    assert number == pytest.approx(expected / 2**20, rel=5e-3)


def test_ranks_share_what_would_have_been_saved(check, monkeypatch) -> None:
    for name, word in (("WORLD_SIZE", "4"), ("MASTER_ADDR", "h"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, word)
    args = check("--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --bf16 --reuse-fp32-param")
    saving = flags_by_name()["--reuse-fp32-param"].saving
    assert f"about {2 * LINEAR / 4 / 2**20:.3g} MiB" in lost_saving(saving, args)
