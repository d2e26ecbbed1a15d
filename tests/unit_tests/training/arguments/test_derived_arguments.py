"""What follows from what, and which values cannot work together."""

import pytest
import torch

from megatron.core import accelerator
from megatron.core.transformer.enums import AttnBackend
from megatron.training.arguments import ArgumentsError, moe_freq_type, print_args


def problems_of(check, words, **options) -> list[str]:
    with pytest.raises(ArgumentsError) as error:
        check(words, **options)
    return [str(problem) for problem in error.value.problems]


DERIVED = [
    # widths
    ("", "ffn_hidden_size", 256),
    ("--swiglu", "ffn_hidden_size", 128),  # int((4*64*2/3)/64)*64
    ("--swiglu --hidden-size 4096 --num-attention-heads 32", "ffn_hidden_size", 10880),
    ("--swiglu --ffn-hidden-size 100", "ffn_hidden_size", 100),
    ("", "kv_channels", 16),
    ("--kv-channels 20", "kv_channels", 20),
    ("--num-attention-heads 3 --kv-channels 8", "kv_channels", 8),
    ("--is-x-model --ffn-hidden-size 100", "ffn_hidden_size", 50),
    ("--is-x-model", "ffn_hidden_size", 128),
    ("--is-x-model", "glu_gate_last", True),
    # layers of others by their names
    ("--spec mindspeed_llm.tasks.models.spec.grok_spec layer_spec", "spec", ["local"]),
    ("--spec modellink.tasks.models.spec.grok_spec layer_spec", "spec", ["local"]),
    ("--spec a.module layer_spec", "spec", ["a.module", "layer_spec"]),
    ("--swiglu --gelu-tanh", "swiglu", False),
    # sizes with two names
    ("", "encoder_num_layers", 2),
    ("", "encoder_seq_length", 32),
    # batch and length
    ("", "global_batch_size", 2),
    ("--global-batch-size 8", "global_batch_size", 8),
    ("", "data_parallel_size", 1),
    ("", "dataloader_type", "single"),
    ("--dataloader-type cyclic", "dataloader_type", "cyclic"),
    ("", "split", None),
    ("--data-path a", "split", "969, 30, 1"),
    ("--data-path a --split 1,1,0", "split", "1,1,0"),
    ("", "consumed_train_samples", 0),
    ("", "skipped_train_samples", 0),
    ("", "consumed_valid_samples", 0),
    ("", "padded_vocab_size", None),
    # precision
    ("", "params_dtype", torch.float32),
    ("--fp16", "params_dtype", torch.float16),
    ("--bf16", "params_dtype", torch.bfloat16),
    ("", "accumulate_allreduce_grads_in_fp32", False),
    ("--fp16", "accumulate_allreduce_grads_in_fp32", False),
    ("--bf16", "accumulate_allreduce_grads_in_fp32", True),
    ("--bf16 --grad-reduce-in-bf16", "accumulate_allreduce_grads_in_fp32", False),
    (
        "--bf16 --grad-reduce-in-bf16 --accumulate-allreduce-grads-in-fp32",
        "accumulate_allreduce_grads_in_fp32",
        False,
    ),
    ("", "check_for_nan_in_loss_and_grad", True),
    ("--fp16", "check_for_nan_in_loss_and_grad", False),
    ("--fp16 --loss-scale 128", "check_for_nan_in_loss_and_grad", True),
    ("--apply-query-key-layer-scaling", "attention_softmax_in_fp32", True),
    ("", "main_grads_dtype", torch.float32),
    # positions
    ("", "position_embedding_type", "learned_absolute"),
    ("", "apply_rope_fusion", False),
    ("--use-rotary-position-embeddings", "position_embedding_type", "rope"),
    ("--position-embedding-type rope", "apply_rope_fusion", True),
    ("--position-embedding-type rope --no-rope-fusion", "apply_rope_fusion", False),
    # biases
    ("", "add_qkv_bias", True),
    ("--disable-bias-linear", "add_qkv_bias", False),
    ("--disable-bias-linear --add-qkv-bias", "add_qkv_bias", True),
    ("--disable-bias-linear", "bias_gelu_fusion", False),
    ("", "bias_gelu_fusion", True),
    # attention
    ("", "window_size", None),
    ("--pre-tockens 8 --next-tockens 0", "window_size", (8, 0)),
    ("--pre-tockens 8 --next-tockens 65536", "window_size", (8, 0)),
    ("--pre-tockens 0", "window_size", (0, 0)),
    ("--pre-tockens 30", "window_size", (30, 0)),
    ("--pre-tockens 31", "window_size", None),  # the last of 32 tokens still sees the first
    ("--pre-tockens 65536 --next-tockens 65536", "window_size", None),
    ("", "attention_layout", "SBH"),
    ("--shape-order BSH", "attention_layout", "BSH"),
    ("", "attention_backend", AttnBackend.auto),
    ("--use-flash-attn", "attention_backend", AttnBackend.flash),
    ("--attention-backend local", "attention_backend", AttnBackend.local),
    ("--use-flash-attn --attention-backend unfused", "attention_backend", AttnBackend.unfused),
    # recompute
    ("--recompute-activations", "recompute_granularity", "selective"),
    ("--recompute-granularity full --recompute-method uniform", "recompute_num_layers", 1),
    (
        "--recompute-granularity full --recompute-method block --recompute-num-layers 2",
        "recompute_num_layers",
        2,
    ),
    ("--activations-checkpoint-method uniform", "recompute_granularity", "full"),
    ("--activations-checkpoint-method block", "recompute_method", "block"),
    ("--activations-checkpoint-method block", "recompute_num_layers", 1),
    ("--recompute-norm", "recompute_modules", ["layernorm"]),
    ("--recompute-norm --recompute-activations", "recompute_modules", ["core_attn", "layernorm"]),
    ("--recompute-norm", "recompute_granularity", "selective"),
    # weight decay
    ("--weight-decay 0.3", "start_weight_decay", 0.3),
    ("--weight-decay 0.3", "end_weight_decay", 0.3),
    (
        "--weight-decay-incr-style linear --start-weight-decay 0 --end-weight-decay 0.1",
        "start_weight_decay",
        0.0,
    ),
    # parallel layout of one process
    ("--sequence-parallel", "sequence_parallel", False),
    ("", "transformer_pipeline_model_parallel_size", 1),
    ("", "expert_tensor_parallel_size", 1),
    ("", "virtual_pipeline_model_parallel_size", None),
    ("", "overlap_p2p_comm", False),
    ("", "variable_seq_lengths", False),
    ("--num-experts 0", "num_experts", None),
    # checkpoints
    ("", "ckpt_format", "torch"),
    ("--ckpt-format torch", "ckpt_format", "torch"),
    ("", "use_dist_ckpt", False),
    # others
    ("--cross-entropy-fusion-impl te", "cross_entropy_fusion_impl", "native"),
    ("--disable-override rms_norm,swiglu", "disable_override", ["rms_norm", "swiglu"]),
]


@pytest.mark.parametrize(("words", "name", "value"), DERIVED)
def test_argument_is_derived_from_the_others(words: str, name: str, value: object, check) -> None:
    assert getattr(check(words), name) == value


def test_twin_names(check) -> None:
    base = "--encoder-num-layers 3 --hidden-size 8 --num-attention-heads 2 --encoder-seq-length 16"
    args = check("--max-position-embeddings 16 --micro-batch-size 1", base=base)
    assert (args.num_layers, args.seq_length) == (3, 16)


def test_rampup_numbers(check) -> None:
    args = check("--rampup-batch-size 4 2 16 --global-batch-size 8 --train-samples 48 --train-iters 0")
    assert args.rampup_batch_size == [4, 2, 16]


def test_a_width_from_a_checkpoint_is_halved_already(parse) -> None:
    from megatron.training.arguments import validate_args

    args = parse("--is-x-model --use-checkpoint-args --load dir")
    args.ffn_hidden_size = 50
    assert validate_args(args).ffn_hidden_size == 50
    assert args.glu_gate_last


def test_withdrawn_attributes_leave(check) -> None:
    args = check("--recompute-activations")
    gone = ("batch_size", "warmup", "model_parallel_size", "checkpoint_activations", "recompute_activations")
    assert not [name for name in (*gone, "given_flags") if hasattr(args, name)]


def test_validating_twice_changes_nothing(check) -> None:
    from megatron.training.arguments import validate_args

    words = (
        "--is-x-model --ffn-hidden-size 100 --bf16 --recompute-norm --pre-tockens 4 --data-path a --save x "
        "--save-interval 4 --use-flash-attn --sequence-parallel --global-batch-size 4"
    )
    args = check(words)
    before = dict(vars(args))
    validate_args(args)
    assert vars(args) == before


def test_lists_are_not_shared_between_runs(check) -> None:
    check().iterations_to_skip.append(5)
    assert check().iterations_to_skip == []


def test_rejected_results_are_skipped(check, tmp_path, monkeypatch) -> None:
    from megatron.core.rerun_state_machine import RerunStateMachine

    flag = "--result-rejected-tracker-filename"
    assert check([flag, str(tmp_path / "none")]).iterations_to_skip == []
    (problem,) = problems_of(check, [flag, str(tmp_path)])
    assert problem.startswith(f"{flag} {tmp_path}: cannot be read")
    found = {"log.txt": [7, 3]}
    monkeypatch.setattr(RerunStateMachine, "get_skipped_iterations_from_tracker_file", found.get)
    assert check([flag, "log.txt", "--iterations-to-skip", "3", "5"]).iterations_to_skip == [3, 5, 7]


def test_settings_of_nccl_are_read_where_it_serves(check, tmp_path, monkeypatch) -> None:
    flag, path = "--nccl-communicator-config-path", tmp_path / "nccl.yaml"
    assert check([flag, str(path)]).nccl_communicator_config_path == str(path)
    monkeypatch.setattr(accelerator, "collective_backend", lambda requested: "nccl")
    (problem,) = problems_of(check, [flag, str(path)])
    assert problem.startswith(f"{flag} {path}: NCCL settings") and "No such file" in problem
    path.write_text("dp: {max_ctas: 16}\n")
    check([flag, str(path)])


BROKEN = [
    # words, what the only message says
    ("--encoder-num-layers 3", "--encoder-num-layers 3: differs from --num-layers 2"),
    ("--num-attention-heads 5", "use --hidden-size 65 or --num-attention-heads 4"),
    ("--group-query-attention --num-query-groups 3", "use --num-query-groups 2"),
    ("--max-position-embeddings 16", "use --max-position-embeddings 32"),
    ("--swiglu --squared-relu", "--swiglu: is a different activation than --squared-relu"),
    ("--is-x-model --ffn-hidden-size 99", "must be even"),
    ("--no-position-embedding", "use --position-embedding-type none"),
    ("--position-embedding-type rope --rotary-interleaved", "add --no-rope-fusion"),
    ("--position-embedding-type rope --kv-channels 9", "rotates pairs"),
    ("--position-embedding-type mrope", "multimodal"),
    ("--recompute-granularity full", "add --recompute-method uniform"),
    ("--recompute-activations --recompute-num-layers 1", "no meaning with selective"),
    ("--recompute-activations --recompute-method block", "no meaning with selective"),
    ("--recompute-activations --recompute-modules core_atn", "did you mean core_attn?"),
    ("--spec one", "takes a module path and a name, or the word local"),
    ("--use-fused-rmsnorm", "needs --normalization RMSNorm"),
    ("--use-fused-swiglu", "needs --swiglu"),
    ("--use-fused-rotary-pos-emb", "needs --position-embedding-type rope"),
    ("--tp-comm-overlap", "needs --sequence-parallel"),
    ("--pre-tockens -1", "--pre-tockens -1: must be at least 0"),
    ("--next-tockens -5", "--next-tockens -5: must be at least 0"),
    ("--fp16 --bf16", "--fp16: excludes --bf16"),
    ("--fp16-lm-cross-entropy", "needs --fp16"),
    ("--fp32-residual-connection", "needs --fp16 or --bf16"),
    ("--reuse-fp32-param --fp16", "needs --bf16"),
    ("--deterministic-mode --use-flash-attn", "--use-flash-attn: has no deterministic form"),
    ("--deterministic-mode --cross-entropy-loss-fusion", "--cross-entropy-loss-fusion: has no deterministic"),
    ("--global-batch-size 5", "use --global-batch-size 4"),
    ("--global-batch-size 1 --decrease-batch-size-if-needed", "use --global-batch-size 2"),
    ("--train-samples 9", "--train-samples 9: excludes --train-iters"),
    ("--lr-decay-samples 9", "use --lr-decay-iters"),
    ("--lr-warmup-samples 9", "use --lr-warmup-iters"),
    (
        "--rampup-batch-size 2 2 8 --global-batch-size 8",
        "does not go with --train-iters; use --train-samples",
    ),
    ("--train-iters 0 --train-samples 9 --lr-decay-iters 3", "use --lr-decay-samples"),
    ("--min-lr 1", "--min-lr 1: is above --lr 0.001; use --min-lr 0.0001"),
    ("--lr-warmup-init 1 --lr-warmup-iters 2", "--lr-warmup-init 1: is above --lr"),
    ("--decoupled-lr 1e-4 --decoupled-min-lr 1", "is above --decoupled-lr 0.0001"),
    ("--lr-warmup-iters 20", "is not below the 20 iterations of the decay; use --lr-warmup-iters 2"),
    ("--lr-warmup-iters 5 --lr-decay-iters 5", "is not below the 5 iterations"),
    ("--lr-warmup-iters 2 --lr-warmup-fraction 0.1", "excludes --lr-warmup-iters 2"),
    ("--lr-warmup-fraction 1", "at least 0 and below 1"),
    ("--lr-decay-style WSD", "for example --lr-wsd-decay-iters 2"),
    ("--start-weight-decay 0.5", "no meaning with a constant weight decay"),
    ("--weight-decay-incr-style cosine --start-weight-decay 0.1", "--end-weight-decay: is required"),
    (
        "--weight-decay-incr-style linear --start-weight-decay 0.2 --end-weight-decay 0.1",
        "is below --start-weight-decay 0.2",
    ),
    ("--save out", "needs --save-interval"),
    ("--override-opt_param-scheduler --use-checkpoint-opt_param-scheduler", "excludes"),
    ("--use-checkpoint-args", "needs --load"),
    ("--mock-data --data-path a", "--mock-data: excludes --data-path"),
    ("--data-path a --data-args-path b", "--data-path: excludes --data-args-path"),
    ("--train-data-path a --per-split-data-args-path b", "excludes --per-split-data-args-path"),
    ("--train-data-path a --split 1,1,1", "every split has data of its own"),
    ("--data-path a --split=-1,2", "for example --split 949,50,1"),
    ("--data-path a --split 0,0", "for example --split 949,50,1"),
    ("--data-path a --split x", "for example --split 949,50,1"),
    ("--tokenizer-type GPT2BPETokenizer --vocab-file v", "add --merge-file PATH"),
    ("--tokenizer-type NullTokenizer", "add --vocab-size 4095"),
    ("--tokenizer-type HuggingFaceTokenizer", "add --tokenizer-model PATH"),
    ("--tokenizer-type PretrainedFromHF", "add --tokenizer-name-or-path DIR"),
    ("--tokenizer-type TikTokenizer --tokenizer-model t", "add --tiktoken-pattern v2"),
    ("--wandb-project p", "add --wandb-exp-name NAME"),
    ("--profile --profile-step-start 5 --profile-step-end 4", "use --profile-step-end 7"),
    ("--ddp-num-buckets 2 --ddp-bucket-size 9", "excludes --ddp-bucket-size"),
    ("--inference-batch-times-seqlen-threshold 4", "needs several pipeline stages"),
    ("--seed 0", "--seed 0: must be at least 1; for example --seed 1234"),
    ("--log-interval 0", "for example --log-interval 100"),
    ("--attention-dropout 1.5", "must be at least 0 and at most 1; for example --attention-dropout 0.1"),
    ("--adam-beta2 1", "below 1; for example --adam-beta2 0.999"),
    ("--clip-grad nan", "must be at least 0"),
    ("--norm-epsilon 0", "must be above 0; for example --norm-epsilon 1e-05"),
    ("--num-workers -1", "for example --num-workers 2"),
]


@pytest.mark.parametrize(("words", "part"), BROKEN)
def test_broken_rule(words: str, part: str, check) -> None:
    (problem,) = problems_of(check, words)
    assert part in problem, problem


RAMPS = [
    ("4 2 16", None),
    ("8 2 16", "use --rampup-batch-size 6 2 16"),  # nothing left to grow
    ("4 3 16", "multiples of 2"),
    ("4 6 16", "use --rampup-batch-size 4 4 16"),
    ("4 2", "takes three whole numbers"),
    ("4 x 16", "takes three whole numbers"),
    ("4 2 0", "must be positive"),
]


@pytest.mark.parametrize(("ramp", "part"), RAMPS)
def test_ramp_up(ramp: str, part: str | None, check) -> None:
    words = f"--rampup-batch-size {ramp} --global-batch-size 8 --train-samples 48 --train-iters 0"
    if part is None:
        check(words)
    else:
        assert any(part in problem for problem in problems_of(check, words))


def test_a_suggested_ramp_is_legal(check) -> None:
    check("--rampup-batch-size 6 2 16 --global-batch-size 8 --train-samples 48 --train-iters 0")


def test_training_needs_a_rate_and_a_length(check) -> None:
    model = (
        "--num-layers 2 --hidden-size 8 --num-attention-heads 2 --seq-length 8 --max-position-embeddings 8"
    )
    model += " --micro-batch-size 1"
    assert "--lr: is required" in problems_of(check, "--train-iters 5", base=model)[0]
    assert "--train-samples is required" in problems_of(check, "--lr 0.1", base=model)[0]
    check("--train-iters 5 --skip-train", base=model)
    check("", base=model)


NOTES = [
    ("", "setting global batch size to 2"),
    ("", "using torch.float32 for parameters ..."),
    ("--bf16", "accumulate and all-reduce gradients in fp32 for bfloat16 data type."),
    ("--bf16", "using torch.bfloat16 for parameters ..."),
    ("--fp16", "WARNING: NaN checks are off"),
    ("--data-path a", "WARNING: --split is not given; using 969, 30, 1"),
    ("--sequence-parallel", "WARNING: --sequence-parallel is switched off"),
    ("--save out --save-interval 5", "notice: --ckpt-format is not given"),
    ("--load out", "notice: --ckpt-format is not given"),
    ("--num-query-groups 2", "WARNING: --num-query-groups has no effect without --group-query-attention"),
    ("--recompute-method block", "has no effect without --recompute-granularity"),
    ("--rotary-base 500000", "has no effect without --position-embedding-type rope"),
    ("--coc-parallel-num 2", "WARNING: --coc-parallel-num has no effect without --use-ascend-coc"),
    ("--use-ascend-coc", "has no effect without --tensor-model-parallel-size 2 or more"),
    ("--use-ascend-mc2 --use-ascend-coc", "WARNING: --use-ascend-mc2 has no effect without --sequence-par"),
    ("--loss-scale 3", "has no effect without --fp16 or --bf16"),
    ("--lr-wsd-decay-iters 3", "has no effect without --lr-decay-style WSD"),
    ("--is-x-model --ffn-hidden-size 100", "each half of the gated MLP is 50 wide"),
    ("--use-flash-attn --attention-backend local", "gives way to --attention-backend local"),
]


@pytest.mark.parametrize(("words", "line"), NOTES)
def test_note_is_printed_once(words: str, line: str, check, capsys) -> None:
    check(words)
    assert capsys.readouterr().out.count(line) == 1


def test_first_line_is_the_layout(check, capsys) -> None:
    check()
    assert capsys.readouterr().out.splitlines()[0] == (
        "using world size: 1, data-parallel size: 1, context-parallel size: 1, "
        "hierarchical context-parallel sizes: Nonetensor-model-parallel size: 1, "
        "encoder-tensor-model-parallel size: 0, pipeline-model-parallel size: 1, "
        "encoder-pipeline-model-parallel size: 0"
    )


def test_no_notice_about_checkpoints_that_are_not_used(check, capsys) -> None:
    check()
    assert "ckpt" not in capsys.readouterr().out


def test_script_defaults(check, capsys) -> None:
    defaults = {"tokenizer_type": "GPT2BPETokenizer"}
    files = "--vocab-file v --merge-file m"
    assert check(files, defaults=defaults).tokenizer_type == "GPT2BPETokenizer"
    assert "overriding" not in capsys.readouterr().out
    args = check("--tokenizer-type NullTokenizer --vocab-size 9", defaults=defaults)
    assert args.tokenizer_type == "NullTokenizer"
    assert "\nWARNING: overriding default arguments for tokenizer_type:" in "\n" + capsys.readouterr().out


def test_deterministic_mode(check) -> None:
    try:
        assert check("--deterministic-mode").deterministic_mode
        assert torch.are_deterministic_algorithms_enabled()
        assert check("--npu-deterministic --use-flash-attn").deterministic_mode
    finally:
        torch.use_deterministic_algorithms(False)


def test_log_arguments_all_prints_every_argument(check, capsys) -> None:
    args = check("--log-arguments all")
    capsys.readouterr()
    print_args(args)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "-" * 24 + " arguments " + "-" * 24
    assert lines[-1] == "-" * 20 + " end of arguments " + "-" * 21
    assert "  num_layers ...................................... 2" in lines
    long = "inference_dynamic_batching_buffer_guaranteed_fraction"
    assert f"  {long}  0.2" in lines
    assert len(lines) == len(vars(args)) + 2
    names = [line.split()[0].lower() for line in lines[1:-1]]
    assert names == sorted(names)


def test_arguments_that_differ_from_their_defaults_are_printed(check, capsys) -> None:
    args = check("--lr 1e-3 --weight-decay 0.01 --init-method-std 0.006 --bf16")
    capsys.readouterr()
    given = ["--num-layers", "--lr", "--weight-decay", "--init-method-std", "--bf16"]
    print_args(args, given)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "-" * 24 + " arguments " + "-" * 24
    assert lines[-1] == "-" * 20 + " end of arguments " + "-" * 21
    words = " ".join(lines[1:-2]).split()
    assert {"num_layers=2", "lr=0.001", "init_method_std=0.006", "bf16=True"} <= set(words)
    # 0.01 is the default weight decay; the width of the feed-forward layers was worked out.
    assert not {"weight_decay", "ffn_hidden_size", "adam_beta1"} & {word.split("=")[0] for word in words}
    assert lines[-2] == (
        f"  {len(vars(args)) - len(words)} others have their defaults or follow from these: "
        "--log-arguments all prints them"
    )
    assert max(map(len, lines)) <= 110


def test_log_arguments_none_prints_nothing(check, capsys) -> None:
    args = check("--log-arguments none")
    capsys.readouterr()
    print_args(args)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        ("-1", -1),
        (3, 3),
        ("([0]+[1]*3)", [0, 1, 1, 1]),
        ("([1]*3+[0]*1)*2", [1, 1, 1, 0, 1, 1, 1, 0]),
        ("[1, 0]", [1, 0]),
    ],
)
def test_moe_frequency(text: object, value: object) -> None:
    assert moe_freq_type(text) == value


@pytest.mark.parametrize(
    "text",
    ["x", "1.5", "[2]", "[1]*10**9", "[1]*99999999", "[f(1)]", "[[1]]", "[1]+1", "(", "[1].pop()", "[True]"],
)
def test_moe_frequency_refuses(text: str) -> None:
    import argparse

    with pytest.raises(argparse.ArgumentTypeError, match="neither an integer nor a list"):
        moe_freq_type(text)
