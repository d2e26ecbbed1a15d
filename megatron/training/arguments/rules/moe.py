"""Rules about experts: their number, where they are, and which layers have them."""

from argparse import Namespace
from collections.abc import Collection

from megatron.training.arguments.problem import Problem

_EP, _ETP, _TP = (
    "--expert-model-parallel-size",
    "--expert-tensor-parallel-size",
    "--tensor-model-parallel-size",
)
_SHARED_WIDTH = "--moe-shared-expert-intermediate-size"


def experts_divide(args: Namespace, given: Collection[str]) -> list[Problem]:
    """Ranks have equally many experts, and equal parts of each."""
    experts, ep, etp = (
        args.num_experts,
        args.expert_model_parallel_size,
        args.expert_tensor_parallel_size,
    )
    if not experts or ep < 1 or etp < 1:
        return []
    problems = []
    if experts % ep:
        rule, remedy = f"does not divide among {_EP} {ep}", f"use --num-experts {-(-experts // ep) * ep}"
        problems.append(Problem("--num-experts", experts, rule, f"{remedy}, or another {_EP}"))
    for flag, width, ranks, among in (
        ("--moe-ffn-hidden-size", args.moe_ffn_hidden_size or args.ffn_hidden_size, etp, _ETP),
        (_SHARED_WIDTH, args.moe_shared_expert_intermediate_size, args.tensor_model_parallel_size, _TP),
    ):
        if width and ranks > 0 and width % ranks:
            rule = f"does not divide among {among} {ranks}"
            problems.append(Problem(flag, width, rule, f"use {flag} {-(-width // ranks) * ranks}"))
    return problems


def experts_are_whole_layers(args: Namespace, given: Collection[str]) -> list[Problem]:
    """Experts have no biases, and see each token once."""
    if not args.num_experts:
        return []
    problems = []
    if args.add_bias_linear:
        rule = "experts have no biases"
        problems.append(Problem("--num-experts", args.num_experts, rule, "add --disable-bias-linear"))
    if args.tensor_model_parallel_size > 1 and not args.sequence_parallel:
        rule = f"experts with {_TP} {args.tensor_model_parallel_size} need --sequence-parallel"
        remedy = "add --sequence-parallel: without it every tensor-parallel rank sends the same tokens"
        problems.append(Problem("--num-experts", args.num_experts, rule, remedy))
    return problems


def layers_with_experts_are_named_once(args: Namespace, given: Collection[str]) -> list[Problem]:
    """--moe-layer-freq and --first-k-dense-replace agree with the number of layers and with each other."""
    frequency, dense, layers = args.moe_layer_freq, args.first_k_dense_replace, args.num_layers
    if not args.num_experts or not layers:
        return []
    problems = []
    if isinstance(frequency, int) and frequency < 1:
        rule = "is no number of layers"
        problems.append(Problem("--moe-layer-freq", frequency, rule, "use 1 or more, or -1 for every layer"))
    if isinstance(frequency, list) and len(frequency) != layers:
        rule = f"says 0 or 1 for {len(frequency)} layers"
        remedy = f"give 0 (dense) or 1 (experts) for each of the {layers} layers"
        problems.append(Problem("--moe-layer-freq", frequency, rule, remedy))
    if dense is not None and dense >= layers:
        rule = f"leaves none of the {layers} layers for experts"
        problems.append(
            Problem(
                "--first-k-dense-replace", dense, rule, f"use --first-k-dense-replace {layers - 1} or less"
            )
        )
    if dense is not None and dense > 0 and "--first-k-dense-replace" in given and _was_a_list(args):
        rule = "is said by the list of --moe-layer-freq already"
        problems.append(Problem("--first-k-dense-replace", dense, rule, "keep one of them"))
    return problems


def _was_a_list(args: Namespace) -> bool:
    """Whether the layers were listed one by one, and not derived from the two flags."""
    frequency, dense = args.moe_layer_freq, args.first_k_dense_replace
    return isinstance(frequency, list) and any(frequency[:dense])


def shared_experts_have_one_width(args: Namespace, given: Collection[str]) -> list[Problem]:
    """--n-shared-experts counts experts, the other flag their width all together."""
    count, width = args.n_shared_experts, args.moe_shared_expert_intermediate_size
    each = args.moe_ffn_hidden_size or args.ffn_hidden_size
    if count is None or not width or not each or width == count * each:
        return []
    rule = f"makes {count * each} channels, but {_SHARED_WIDTH} is {width}"
    return [Problem("--n-shared-experts", count, rule, "keep one of them")]


def whole_experts_are_asked_once(args: Namespace, given: Collection[str]) -> list[Problem]:
    """--moe-tp-extend-ep is another way to ask for whole experts."""
    if "--moe-tp-extend-ep" not in given or _ETP not in given:
        return []
    return [Problem("--moe-tp-extend-ep", None, f"excludes {_ETP}", "keep one of them")]


def parts_of_experts_have_files(args: Namespace, given: Collection[str]) -> list[Problem]:
    """A checkpoint's files are named by one tensor-parallel rank, which must tell that of experts as well."""
    tp, etp = args.tensor_model_parallel_size, args.expert_tensor_parallel_size
    if not args.num_experts or not args.save or tp < 1 or not etp or etp < 1:
        return []
    if max(tp, etp) % min(tp, etp) == 0:
        return []
    rule = f"and {_TP} {tp}: files of a checkpoint are named by one of both, so the larger must be a multiple"
    return [Problem(_ETP, etp, rule, f"use a divisor or a multiple of {tp}, or leave --save out")]


RULES = (
    experts_divide,
    experts_are_whole_layers,
    layers_with_experts_are_named_once,
    shared_experts_have_one_width,
    whole_experts_are_asked_once,
    parts_of_experts_have_files,
)
