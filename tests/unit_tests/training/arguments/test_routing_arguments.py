"""Flags of routing: the fields they set, what they do nothing with, and what does not go together."""

import pytest

from megatron.training.arguments import ArgumentsError, core_transformer_config_from_args

EXPERTS = "--num-experts 8 --moe-ffn-hidden-size 32 --disable-bias-linear"
KIND = "--moe-router-load-balancing-type"
SIGMOID = "--moe-router-score-function sigmoid"


@pytest.mark.parametrize(
    ("words", "field", "value"),
    [
        ("", "moe_router_load_balancing_type", "aux_loss"),
        (f"{KIND} seq_aux_loss", "moe_router_load_balancing_type", "seq_aux_loss"),
        ("--moe-router-dtype fp64", "moe_router_dtype", "fp64"),
        ("--router-gating-in-fp32", "moe_router_dtype", "fp32"),
        ("--moe-router-topk 6", "moe_router_topk", 6),
        (f"{SIGMOID} --moe-router-enable-expert-bias", "moe_router_enable_expert_bias", True),
        ("--moe-expert-capacity-factor -1", "moe_expert_capacity_factor", None),
        (f"{KIND} none --seq-aux --moe-aux-loss-coeff 0.1", "seq_aux", True),
        ("--moe-router-force-load-balancing", "moe_router_force_load_balancing", True),
        ("--log-moe-balance", "log_moe_balance", True),
    ],
)
def test_a_flag_becomes_a_field(words, field, value, check):
    config = core_transformer_config_from_args(check(f"{EXPERTS} {words}"))
    assert getattr(config, field) == value


GREEDY = f"{KIND} group_limited_greedy --moe-router-num-groups 4 --moe-router-group-topk 2"


@pytest.mark.parametrize(
    ("words", "flag", "reason"),
    [
        (f"{KIND} none --moe-aux-loss-coeff 0.1", "--moe-aux-loss-coeff", "has no loss"),
        (f"{KIND} softmax_topk --moe-aux-loss-coeff 0.1", "--moe-aux-loss-coeff", "has no loss"),
        ("--seq-aux", "--seq-aux", f"without {KIND} none or group_limited_greedy"),
        (f"{KIND} none --norm-topk-prob", "--norm-topk-prob", "without"),
        ("--moe-router-num-groups 4", "--moe-router-num-groups", "without --moe-router-group-topk"),
        ("--moe-router-bias-update-rate 0.1", "--moe-router-bias-update-rate", "enable-expert-bias"),
        ("--moe-token-drop-policy position", "--moe-token-drop-policy", "capacity-factor"),
        ("--moe-comm-aux-loss-coeff 0.1", "--moe-comm-aux-loss-coeff", "group_limited_greedy"),
        (f"{KIND} pai_megatron_aux_loss {SIGMOID}", "--moe-router-score-function", "with"),
        (f"{KIND} softmax_topk --moe-router-pre-softmax", "--moe-router-pre-softmax", "with"),
        (f"{KIND} sinkhorn --moe-router-topk-scaling-factor 2", "--moe-router-topk-scaling-factor", "with"),
        (
            f"{GREEDY} --norm-topk-prob --moe-router-topk-scaling-factor 2",
            "--moe-router-topk-scaling-factor",
            "--norm-topk-prob takes its place",
        ),
    ],
)
def test_a_flag_that_routing_does_nothing_with_is_named(words, flag, reason, check, capsys):
    check(f"{EXPERTS} {words}")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(f"WARNING: {flag} ")]
    assert len(lines) == 1
    assert "has no effect" in lines[0] and reason in lines[0]


@pytest.mark.parametrize("words", [f"{GREEDY} --moe-router-topk-scaling-factor 2", SIGMOID])
def test_a_flag_that_routing_reads_is_not_named(words, check, capsys):
    check(f"{EXPERTS} {words}")
    assert "has no effect" not in capsys.readouterr().out


def test_every_broken_rule_of_routing_is_told_at_once(check):
    with pytest.raises(ArgumentsError) as caught:
        check(
            f"--num-experts 6 --disable-bias-linear {KIND} sinkhorn --moe-aux-loss-coeff 0.1 "
            "--moe-router-enable-expert-bias --moe-router-topk 7 --moe-router-num-groups 4 "
            "--moe-router-group-topk 5 --moe-expert-capacity-factor 1.0"
        )
    told = [str(problem) for problem in caught.value.problems]
    for words in [
        "sinkhorn routing is even by itself",
        "sigmoid",
        "chooses without a bias",
        "choose 1 to 6 experts",
        "divisible by",
        "exceeds",
        "aux_loss, seq_aux_loss, none",
    ]:
        assert any(words in problem for problem in told), (words, told)


def test_the_sparse_mixer_is_refused_with_what_to_use(check):
    with pytest.raises(ArgumentsError, match="use aux_loss with --moe-router-topk 2"):
        check(f"{EXPERTS} {KIND} sparsemixer_topk")
