"""Whoever gives a flag is told if nothing reads it, and is told nothing about a flag that acts.

All reads of arguments and config fields are recorded in runs that give every working flag once, in company
in which it acts. What the record says is compared with what the product would say.
"""

import contextlib
import io
import json
import re
import sys
from argparse import Namespace
from functools import cache
from pathlib import Path
from unittest import mock

import pytest

from megatron.core.enums import ModelType
from megatron.training.arguments.flag import never
from megatron.training.arguments.flags import ALL_FLAGS, READ_LATER
from tests.distributed.observed_run import Observed, observe
from tests.distributed.pool import run_ranks

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
SIZES = (
    "--num-layers 4 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --max-position-embeddings 32 "
    "--micro-batch-size 1"
)
BASE = (
    f"{SIZES} --global-batch-size 8 --lr 1e-3 --tokenizer-type NullTokenizer --vocab-size 500 --eval-iters 1 "
    "--eval-interval 1 --num-workers 0 --log-interval 1"
)
DATA = "--data-path {data}/u16_text_document --split 90,8,2 --data-cache-path {out}/cache"
TP2, PP2, CP2 = (f"--{kind}-parallel-size 2" for kind in ("tensor-model", "pipeline-model", "context"))
EXPERTS = "--num-experts 8 --disable-bias-linear"

# Name -> (ranks, words beside BASE). Every working flag that has any effect on a CPU stands in one of them.
RUNS: dict[str, tuple[int, str]] = {
    "gelu": (
        1,
        f"{DATA} --train-iters 2 --no-bias-gelu-fusion --kv-channels 16 --attention-backend unfused --bf16 "
        "--no-masked-softmax-fusion --apply-query-key-layer-scaling --attention-softmax-in-fp32 "
        "--fp32-residual-connection --apply-residual-connection-post-layernorm --qk-layernorm "
        "--apply-layernorm-1p --norm-epsilon 1e-6 --attention-dropout 0.2 --hidden-dropout 0.2 "
        "--loss-scale 8 --grad-reduce-in-bf16 --init-method-std 0.05 --use-cpu-initialization --seed 7 "
        "--weight-decay 0.1 --clip-grad 0.5 --adam-beta1 0.8 --adam-beta2 0.99 --adam-eps 1e-7 "
        "--lr-decay-style cosine --min-lr 1e-5 --lr-warmup-iters 1 --lr-warmup-init 1e-6 --lr-decay-iters 3 "
        "--decoupled-lr 1e-4 --decoupled-min-lr 1e-5 --transformer-impl local --pre-tockens 4 "
        "--reset-attention-mask --reset-position-ids --eod-mask-loss --no-mmap-bin-files --num-workers 0 "
        "--num-dataset-builder-threads 2 --make-vocab-size-divisible-by 64 --distributed-backend gloo "
        "--disable-gloo-process-groups --distributed-timeout-minutes 3 --no-gradient-accumulation-fusion "
        "--recompute-granularity selective --recompute-modules mlp --disable-override swiglu",
    ),
    "diagnostics": (
        1,
        f"{DATA} --train-iters 4 --save {{out}}/save --save-interval 1 --no-save-optim --no-save-rng "
        "--log-progress --tensorboard-dir {out}/tb --tensorboard-log-interval 2 --tensorboard-queue-size 9 "
        "--log-timers-to-tensorboard --no-log-loss-scale-to-tensorboard --log-validation-ppl-to-tensorboard "
        "--log-memory-to-tensorboard --log-world-size-to-tensorboard --log-params-norm "
        "--log-num-zeros-in-grad --log-throughput --timing-log-level 1 --timing-log-option all "
        "--no-barrier-with-level-1-timing --logging-level 40 --log-arguments none --profile "
        "--profile-step-start 0 --profile-step-end 1 --profile-ranks 0 1 --use-pytorch-profiler --manual-gc "
        "--manual-gc-interval 1 --no-manual-gc-eval --config-logger-dir {out}/configs --check-for-spiky-loss "
        "--check-for-large-grads --train-sync-interval 1 --exit-duration-in-mins 9 --exit-interval 9 "
        "--exit-signal-handler --result-rejected-tracker-filename {out}/tracker --iterations-to-skip 1 "
        "--no-check-for-nan-in-loss-and-grad --calculate-per-token-loss --deterministic-mode "
        "--log-straggler --disable-straggler-on-startup --straggler-ctrlr-port 0 "
        "--straggler-minmax-count 2 "
        "--ckpt-format torch",
    ),
    "llama": (
        1,
        f"{DATA} --train-iters 2 --swiglu --ffn-hidden-size 64 --normalization RMSNorm "
        "--untie-embeddings-and-output-weights --disable-bias-linear --add-qkv-bias --group-query-attention "
        "--num-query-groups 2 --position-embedding-type rope --rotary-base 500 --rotary-percent 0.5 "
        "--rotary-interleaved --no-rope-fusion --rotary-seq-len-interpolation-factor 2 --use-rope-scaling "
        "--rope-scaling-factor 4 --recompute-granularity full --recompute-method block "
        "--recompute-num-layers 1 --fp16 --initial-loss-scale 1024 --min-loss-scale 2 --loss-scale-window 10 "
        "--hysteresis 3 --accumulate-allreduce-grads-in-fp32 --fp16-lm-cross-entropy --spec local "
        "--dataloader-type cyclic --no-data-sharding --lr-decay-style WSD --lr-wsd-decay-style cosine "
        "--lr-wsd-decay-iters 1 --lr-warmup-fraction 0.2 --weight-decay-incr-style linear "
        "--start-weight-decay 0.1 --end-weight-decay 0.2",
    ),
    "samples": (
        1,
        "--train-data-path {data}/u16_text_document --valid-data-path {data}/u16_text_document "
        "--test-data-path {data}/u16_text_document --data-cache-path {out}/cache --train-samples 16 "
        "--lr-decay-samples 16 --lr-warmup-samples 4 --rampup-batch-size 2 2 4 --optimizer sgd "
        "--sgd-momentum 0.5 --squared-relu --use-rotary-position-embeddings --use-flash-attn "
        "--recompute-activations --init-method-xavier-uniform --encoder-num-layers 4 --encoder-seq-length 16 "
        "--decrease-batch-size-if-needed",
    ),
    "wsd samples": (
        1,
        "--mock-data --vocab-size 5000 --train-samples 16 --lr-decay-style WSD --lr-wsd-decay-samples 8 "
        "--is-x-model --ffn-hidden-size 64",
    ),
    "resume": (
        1,
        f"{DATA} --train-iters 1 --load {{saved}} --exit-on-missing-checkpoint --no-load-optim "
        "--no-load-rng --use-checkpoint-args --use-mp-args-from-checkpoint-args --no-initialization "
        "--no-use-tokenizer-model-from-checkpoint-args --skip-train",
    ),
    "resume a schedule": (
        1,
        "--data-args-path {out}/prefixes --split 90,8,2 --data-cache-path {out}/cache --train-iters 2 "
        "--load {saved} --use-checkpoint-opt_param-scheduler",
    ),
    "start over": (
        1,
        "--per-split-data-args-path {out}/splits.json --data-cache-path {out}/cache --train-iters 1 "
        "--load {saved} --finetune",
    ),
    "override a schedule": (
        1,
        f"{DATA} --train-iters 2 --load {{saved}} --ckpt-step 1 --override-opt_param-scheduler",
    ),
    "from another run": (
        1,
        f"{DATA} --train-iters 1 --load {{out}}/nothing --pretrained-checkpoint {{saved}}",
    ),
    "tensor parallel": (
        2,
        f"{DATA} --train-iters 1 {TP2} --sequence-parallel --no-clone-scatter-output-in-embedding "
        "--use-ascend-coc --coc-parallel-num 2",
    ),
    "saved inputs": (
        2,
        f"{DATA} --train-iters 1 {TP2} --recompute-granularity full --recompute-method uniform "
        "--distribute-saved-activations",
    ),
    "data parallel": (
        2,
        f"{DATA} --train-iters 1 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather "
        "--ddp-num-buckets 3 --ddp-average-in-collective --data-parallel-random-init "
        "--check-weight-hash-across-dp-replicas-interval 1",
    ),
    "virtual stages": (
        2,
        f"{DATA} --train-iters 1 {PP2} --num-virtual-stages-per-pipeline-rank 2 "
        "--microbatch-group-size-per-virtual-pipeline-stage 4 --no-overlap-p2p-communication",
    ),
    "virtual stages by layers": (
        4,
        f"{DATA} --train-iters 1 {PP2} --num-layers-per-virtual-pipeline-stage 1 --use-tp-pp-dp-mapping "
        "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --ddp-bucket-size 3000 "
        "--no-align-grad-reduce --no-align-param-gather",
    ),
    "uneven stages": (
        2,
        f"{DATA} --train-iters 1 {PP2} --num-layers 5 --decoder-first-pipeline-num-layers 2 "
        "--decoder-last-pipeline-num-layers 3 --pipeline-schedule zb-h1",
    ),
    "embedding and loss as layers": (
        2,
        f"{DATA} --train-iters 1 {PP2} --account-for-embedding-in-pipeline-split "
        "--account-for-loss-in-pipeline-split",
    ),
    "experts": (
        2,
        f"{DATA} --train-iters 2 {EXPERTS} --expert-model-parallel-size 2 --expert-tensor-parallel-size 1 "
        "--first-k-dense-replace 1 --moe-layer-freq 1 --moe-ffn-hidden-size 32 --moe-grouped-gemm "
        "--moe-use-legacy-grouped-gemm --moe-token-dispatcher-type alltoall --n-shared-experts 1 "
        "--shared-expert-gate --moe-shared-expert-overlap --moe-layer-recompute --moe-router-topk 4 "
        "--moe-router-load-balancing-type group_limited_greedy --moe-router-num-groups 4 "
        "--moe-router-group-topk 2 --moe-router-topk-scaling-factor 2 --moe-aux-loss-coeff 0.01 "
        "--moe-device-level-aux-loss-coeff 0.01 --moe-comm-aux-loss-coeff 0.01 --seq-aux "
        "--moe-z-loss-coeff 0.01 --moe-input-jitter-eps 0.01 --moe-router-dtype fp32 --log-moe-balance "
        "--moe-per-layer-logging --tensorboard-dir {out}/experts",
    ),
    "experts with a bias": (
        1,
        f"{DATA} --train-iters 2 {EXPERTS} --moe-router-load-balancing-type none "
        "--moe-router-score-function sigmoid --moe-router-enable-expert-bias "
        "--moe-router-bias-update-rate 0.01 --moe-expert-capacity-factor 1.25 "
        "--moe-pad-expert-input-to-capacity --moe-token-drop-policy position "
        "--moe-shared-expert-intermediate-size 32",
    ),
    "experts by a softmax over all": (
        1,
        f"{DATA} --train-iters 2 {EXPERTS} --moe-router-pre-softmax --norm-topk-prob",
    ),
    "experts in turn": (1, f"{DATA} --train-iters 2 {EXPERTS} --moe-router-force-load-balancing"),
    "latent attention and further tokens": (
        1,
        f"{DATA} --train-iters 2 --multi-latent-attention --q-lora-rank 16 --kv-lora-rank 12 --qk-head-dim 8 "
        "--qk-pos-emb-head-dim 4 --v-head-dim 8 --rotary-scaling-factor 4 --mscale 0.7 --mscale-all-dim 0.3 "
        "--position-embedding-type rope --mtp-num-layers 1 --mtp-loss-scaling-factor 0.2 --mtp-before-norm",
    ),
    "grok": (
        1,
        f"{DATA} --train-iters 1 --post-norm --embedding-multiplier-scale 2 --output-multiplier-scale 0.5 "
        "--output-logit-softcapping 30 --geglu --disable-bias-linear",
    ),
    "gate by tanh": (1, f"{DATA} --train-iters 1 --gelu-tanh --disable-bias-linear"),
    "grok preset": (1, f"{DATA} --train-iters 1 --grok-preset modellink --num-query-groups 2"),
    "context": (2, f"{DATA} --train-iters 1 {CP2} --cp-comm-type a2a"),
    "context of two levels": (
        4,
        f"{DATA} --train-iters 1 --context-parallel-size 4 --cp-comm-type a2a+p2p "
        "--hierarchical-context-parallel-sizes 2 2",
    ),
    "context by its old names": (
        4,
        f"{DATA} --train-iters 1 --context-parallel-size 4 --context-parallel-algo hybrid_cp_algo "
        "--ulysses-degree-in-cp 2",
    ),
}
# Working flags that no run above gives: what they need is not here, or they have tests of their own.
ELSEWHERE = {
    "--empty-unused-memory-level": "a device with memory of its own",
    "--no-shared-storage": "several hosts",
    "--hccl-group-buffer": "a device whose collectives take sizes of buffers",
    "--local-rank": "given by launchers",
    "--rendezvous-timeout": "ranks that meet over a launcher's address",
    "--wandb-project": "the wandb package",
    "--wandb-exp-name": "the wandb package",
    "--wandb-save-dir": "the wandb package",
    "--yaml-cfg": "replaces the command line",
    "--no-position-embedding": "a position type that no GPT has",
    "--moe-use-upcycling": "a dense checkpoint without biases: see test_upcycled_runs",
    "--vocab-file": "files of tokenizers",
    "--merge-file": "files of tokenizers",
    "--vocab-extra-ids": "files of tokenizers",
    "--tokenizer-model": "files of tokenizers",
    "--tiktoken-pattern": "files of tokenizers",
    "--tiktoken-num-special-tokens": "files of tokenizers",
    "--tiktoken-special-tokens": "files of tokenizers",
    "--tokenizer-name-or-path": "files of tokenizers",
    "--no-ckpt-fully-parallel-save": "another format of checkpoints",
    "--ckpt-fully-parallel-load": "another format of checkpoints",
    "--no-create-attention-mask-in-dataloader": "it takes the effect of --reset-attention-mask away",
}
# Read before the record begins, or waiting for something that does not happen in these runs.
UNSEEN = {
    "grok_preset",
    "deterministic_mode",
    "encoder_num_layers",
    "encoder_seq_length",
    "apply_rope_fusion",
    "use_checkpoint_args",
    "use_mp_args_from_checkpoint_args",
    "use_tokenizer_model_from_checkpoint_args",
    "ckpt_format",
    "exit_on_missing_checkpoint",
    "empty_unused_memory_level",
    "use_pytorch_profiler",
    "rendezvous_timeout",
}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Directories of the runs, with a checkpoint of one step."""
    out = tmp_path_factory.mktemp("runs")
    data = GOLDEN / "data"
    (out / "prefixes").write_text(f"1.0 {data / 'u16_text_document'}")
    blend = str(data / "u16_text_document")
    (out / "splits.json").write_text(json.dumps({"train": blend, "valid": blend, "test": blend}))
    names = {"data": str(data), "out": str(out), "saved": str(out / "saved")}
    words = f"{BASE} {DATA} --train-iters 2 --save {{saved}} --save-interval 1 --exit-interval 1"
    run_ranks(1, observe, words.format(**names).split())
    return names


@pytest.fixture(scope="module")
def observed(places: dict[str, str]):
    @cache
    def run(name: str) -> list[Observed]:
        ranks, words = RUNS[name]
        return run_ranks(ranks, observe, f"{BASE} {words}".format(**places).split())

    return run


@pytest.mark.parametrize("name", RUNS)
def test_no_flag_that_acts_is_named(name: str, observed) -> None:
    first = observed(name)[0]
    assert first.named == ()
    assert set(re.findall(r"WARNING: (--\S+) has no effect", first.output)) == set()


def test_every_working_flag_is_given_once() -> None:
    given = set(re.findall(r"--[\w-]+", " ".join((BASE, DATA, *(words for _, words in RUNS.values())))))
    exempt = {flag.name for flag in ALL_FLAGS if flag.not_built} | _without_any_effect()
    missing = {flag.name for flag in ALL_FLAGS if flag.works and not given & set(flag.names)}
    assert sorted(missing - exempt) == sorted(ELSEWHERE.keys() - exempt)
    assert not given & (ELSEWHERE.keys() | _without_any_effect())


def _without_any_effect() -> set[str]:
    """Flags that change nothing in any company."""
    return {flag.name for flag in ALL_FLAGS if any(entry.acts is never for entry in flag.no_effect)}


def test_what_is_said_to_be_read_later_is(observed) -> None:
    later = set().union(*(record.read_later for name in RUNS for record in observed(name)))
    assert READ_LATER - UNSEEN - later == set()


def own_flags_run(words: list[str], stage_reads: bool) -> str:
    """A script with flags of its own: one for the model, one for the loss, one that nobody reads."""
    import pretrain_gpt
    from megatron.training import get_args, pretrain

    def add_flags(parser):
        for name in ("--mine-for-model", "--mine-for-loss", "--mine-for-nobody"):
            parser.add_argument(name, type=int, default=0)
        return parser

    def model_provider(pre_process=True, post_process=True):
        assert get_args().mine_for_model == 3
        return pretrain_gpt.model_provider(pre_process, post_process)

    def forward_step(data_iterator, model):
        output, loss = pretrain_gpt.forward_step(data_iterator, model)

        def own_loss(tensor):
            assert get_args().mine_for_loss == 4
            if stage_reads:
                dict(vars(get_args()))
            return loss(tensor)

        return output, own_loss

    provider = pretrain_gpt.train_valid_test_datasets_provider
    provider.is_distributed = True
    sys.argv = ["own.py", *words]
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        try:
            pretrain(
                provider,
                model_provider,
                ModelType.encoder_or_decoder,
                forward_step,
                extra_args_provider=add_flags,
            )
        except SystemExit as end:
            assert not end.code
    args = get_args()
    assert type(args) is Namespace
    return output.getvalue()


OWN = "--mine-for-model 3 --mine-for-loss 4 --mine-for-nobody 5"


@pytest.mark.parametrize("ending", ["", "--exit-interval 1"])
@pytest.mark.parametrize("layout", ["", PP2])  # of two stages, the last one alone computes the loss
def test_a_flag_of_the_script_that_nothing_read_is_named_at_the_end(layout, ending, places) -> None:
    words = f"{BASE} {DATA} --train-iters 2 {OWN} {layout} {ending}".format(**places).split()
    first = run_ranks(2 if layout else 1, own_flags_run, words, False)[0]
    named = re.findall(r"WARNING: (\S+) was given, but nothing", first)
    assert named == ["--mine-for-nobody"]
    assert first.index("done with setup") < first.index("--mine-for-nobody was given")


def test_a_script_that_takes_all_arguments_as_a_mapping_may_have_read_them(places) -> None:
    words = f"{BASE} {DATA} --train-iters 1 {OWN}".format(**places).split()
    assert "was given, but nothing" not in run_ranks(1, own_flags_run, words, True)[0]


def run_with_a_new_flag(words: list[str], reads_it: bool) -> str:
    """The project's own run with a flag in its tables that the code reads, or does not."""
    import pretrain_gpt
    from megatron.training import get_args
    from megatron.training.arguments import parsing
    from megatron.training.arguments.flag import Group, value
    from megatron.training.arguments.flags import GROUPS, flags_by_name

    group = Group("new", (value("--brand-new", type=int, default=0),))
    by_name = flags_by_name() | {"--brand-new": group.flags[0]}
    provide = pretrain_gpt.model_provider

    def model_provider(*args, **kwargs):
        if reads_it:
            assert get_args().brand_new == 1
        return provide(*args, **kwargs)

    sys.argv = ["pretrain_gpt.py", *words]
    output = io.StringIO()
    with (
        mock.patch.object(parsing, "GROUPS", (*GROUPS, group)),
        mock.patch.object(parsing, "flags_by_name", lambda: by_name),
        mock.patch("megatron.training.unread_flags.flags_by_name", lambda: by_name),
        mock.patch.object(pretrain_gpt, "model_provider", model_provider),
        contextlib.redirect_stdout(output),
    ):
        pretrain_gpt.main()
    return output.getvalue()


@pytest.mark.parametrize("reads_it", [False, True])
def test_a_flag_that_no_code_reads_is_named_when_set_up_is_over(reads_it: bool, places) -> None:
    words = f"{BASE} {DATA} --train-iters 1 --brand-new 1".format(**places).split()
    output = run_ranks(1, run_with_a_new_flag, words, reads_it)[0]
    sentence = "WARNING: --brand-new was given, but nothing has read it: it has no effect in this run\n"
    assert output.count(sentence) == (0 if reads_it else 1)
    if not reads_it:
        assert (
            output.index("after dataloaders are built") < output.index(sentence) < output.index("iteration ")
        )
