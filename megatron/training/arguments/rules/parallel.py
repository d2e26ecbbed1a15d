"""Rules about how the world and the model divide among ranks."""

from argparse import Namespace
from collections.abc import Collection, Sequence
from math import lcm, prod

from megatron.training.arguments.derive import CLAMP
from megatron.training.arguments.problem import Problem

_TP, _PP, _CP = "--tensor-model-parallel-size", "--pipeline-model-parallel-size", "--context-parallel-size"
_EP, _ETP = "--expert-model-parallel-size", "--expert-tensor-parallel-size"
_VIRTUAL = "--num-virtual-stages-per-pipeline-rank"
_LAYERS_EACH = "--num-layers-per-virtual-pipeline-stage"


def world_divides(args: Namespace, given: Collection[str]) -> list[Problem]:
    """The world is a whole number of models, and of models of experts."""
    tp, pp, cp = (
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
        args.context_parallel_size,
    )
    dense = {_TP: tp, _PP: pp, _CP: cp}
    expert = {_ETP: args.expert_tensor_parallel_size, _EP: args.expert_model_parallel_size, _PP: pp}
    problems = []
    for label, sizes in (
        ("tensor x pipeline x context", dense),
        ("expert tensor x expert x pipeline", expert),
    ):
        ranks = prod(sizes.values())
        if min(sizes.values()) < 1 or args.world_size % ranks == 0:
            continue
        if problems and sizes[_ETP] == tp and sizes[_EP] == 1:
            continue  # sizes that follow from the dense ones: told already
        rule = (
            f"the world does not divide into {label} = {' x '.join(map(str, sizes.values()))} = {ranks} ranks"
        )
        problems.append(Problem("WORLD_SIZE", args.world_size, rule, _what_fits(args.world_size, sizes)))
    return problems


def _what_fits(world: int, sizes: dict[str, int]) -> str:
    """Worlds near this one that the sizes divide, and single sizes that would divide this world."""
    ranks = prod(sizes.values())
    below = world // ranks * ranks
    worlds = " or ".join(str(size) for size in (below, below + ranks) if size)
    smaller = []
    for flag, size in sizes.items():
        others = ranks // size
        if size > 1 and world % others == 0:
            smaller.append(f"{flag} {max(d for d in range(1, size) if world // others % d == 0)}")
    fits = f"start {worlds} ranks" + (f", or use {' or '.join(smaller)}" if smaller else "")
    if world < ranks:
        fits += f"; {CLAMP}=1 shrinks the sizes to the world"
    return fits


def expert_pipelines_agree(args: Namespace, given: Collection[str]) -> list[Problem]:
    """With pipelines inside the data axis, dense and expert layers need equal data-parallel sizes."""
    pp = args.pipeline_model_parallel_size
    expert = args.expert_tensor_parallel_size * args.expert_model_parallel_size
    dense = args.tensor_model_parallel_size * args.context_parallel_size
    if not args.use_tp_pp_dp_mapping or pp == 1 or expert == dense:
        return []
    rule = (
        f"gives dense layers pipelines of other ranks than expert layers ({dense} and {expert} ranks a stage)"
    )
    return [
        Problem("--use-tp-pp-dp-mapping", None, rule, f"leave it out, or choose {_ETP} so that they agree")
    ]


def virtual_stages_fit(args: Namespace, given: Collection[str]) -> list[Problem]:
    """Virtual stages need real ones, and are given in one way."""
    layers_each, stages = (
        args.num_layers_per_virtual_pipeline_stage,
        args.num_virtual_stages_per_pipeline_rank,
    )
    if layers_each is None and stages is None:
        return []
    flag, asked = (_LAYERS_EACH, layers_each) if stages is None else (_VIRTUAL, stages)
    if layers_each is not None and stages is not None:
        return [Problem(_LAYERS_EACH, layers_each, f"excludes {_VIRTUAL} {stages}", "keep one of them")]
    problems = []
    if asked is not None and asked < 1:
        problems.append(Problem(flag, asked, "must be at least 1", f"for example {flag} 1"))
    if args.pipeline_model_parallel_size < 2:
        remedy = f"leave it out, or use {_PP} 2 or more"
        problems.append(Problem(flag, asked, "needs several pipeline stages", remedy))
    elif layers_each and layers_each > 0:
        problems += _whole_virtual_stages(args, layers_each)
    return problems


def _whole_virtual_stages(args: Namespace, layers_each: int) -> list[Problem]:
    for name in ("first", "last"):
        count = getattr(args, f"decoder_{name}_pipeline_num_layers")
        if count is not None:
            flag = f"--decoder-{name}-pipeline-num-layers"
            return [Problem(flag, count, f"excludes {_LAYERS_EACH}", f"use {_VIRTUAL} instead of the latter")]
    slots = _slots(args)
    unit = args.pipeline_model_parallel_size * layers_each
    if slots is None or slots % unit == 0:
        return []
    stages = args.pipeline_model_parallel_size
    rule = f"{slots} layers do not fill {stages} pipeline stages with whole virtual stages"
    remedy = f"use --num-layers {_next(slots, unit) - slots + args.num_layers}"
    each = [d for d in range(1, layers_each) if slots % (stages * d) == 0]
    if each:
        remedy += f" or {_LAYERS_EACH} {each[-1]}"
    return [Problem(_LAYERS_EACH, layers_each, rule, remedy)]


def _slots(args: Namespace) -> int | None:
    """Layers that are dealt out, with the embedding and the loss where they count as one."""
    extras = args.account_for_embedding_in_pipeline_split + args.account_for_loss_in_pipeline_split
    return args.num_layers + extras if args.num_layers else None


def _next(number: int, unit: int) -> int:
    return -(-number // unit) * unit


def layers_divide(args: Namespace, given: Collection[str]) -> list[Problem]:
    """Without uneven stages, stages hold equal numbers of layers."""
    pp, slots = args.pipeline_model_parallel_size, _slots(args)
    uneven = {args.decoder_first_pipeline_num_layers, args.decoder_last_pipeline_num_layers} != {None}
    if uneven or not slots or pp < 1 or args.num_layers_per_virtual_pipeline_stage is not None:
        return []
    unit = pp * max(1, args.virtual_pipeline_model_parallel_size or 1)
    if slots % unit == 0:
        return []
    counted = "" if slots == args.num_layers else f" ({slots} with the embedding and the loss as asked)"
    rule = f"does not divide into {unit} equal (virtual) stages{counted}"
    remedy = (
        f"use --num-layers {_next(slots, unit) - slots + args.num_layers}, or uneven stages with "
        "--decoder-first-pipeline-num-layers and --decoder-last-pipeline-num-layers"
    )
    return [Problem("--num-layers", args.num_layers, rule, remedy)]


def schedule_fits(args: Namespace, given: Collection[str]) -> list[Problem]:
    """The order of a pipeline's passes goes with its stages."""
    schedule, virtual = args.pipeline_schedule, args.virtual_pipeline_model_parallel_size
    if schedule is None:
        return []
    if args.pipeline_model_parallel_size < 2:
        return [Problem("--pipeline-schedule", schedule, "needs several pipeline stages", "leave it out")]
    if schedule == "interleaved" and virtual is None:
        return [Problem("--pipeline-schedule", schedule, "needs virtual stages", f"add {_VIRTUAL} 2")]
    if schedule != "interleaved" and virtual is not None:
        rule = "runs one virtual stage per rank"
        return [Problem("--pipeline-schedule", schedule, rule, "use interleaved, or no virtual stages")]
    return []


def interleaving_has_full_groups(args: Namespace, given: Collection[str]) -> list[Problem]:
    """Microbatches go through virtual stages in groups; none may be smaller than the pipeline is long."""
    pp, flag = args.pipeline_model_parallel_size, "--microbatch-group-size-per-virtual-pipeline-stage"
    group = args.microbatch_group_size_per_vp_stage
    if args.virtual_pipeline_model_parallel_size is None or pp < 2:
        if group is not None:
            return [Problem(flag, group, "needs virtual pipeline stages", "leave it out")]
        return []
    if group is not None and group < pp:
        return [Problem(flag, group, f"is below the {pp} pipeline stages", f"use {flag} {pp} or more")]
    return _partial_groups(args, group or pp)


def _partial_groups(args: Namespace, group: int) -> list[Problem]:
    """The first batch size of the run whose last group of microbatches is too small."""
    pp, unit = args.pipeline_model_parallel_size, (args.micro_batch_size or 0) * args.data_parallel_size
    if unit < 1:
        return []
    for size in _batch_sizes(args):
        microbatches, left_over = divmod(size, unit)
        rest = microbatches % group
        if (left_over and not args.decrease_batch_size_if_needed) or rest == 0 or rest >= pp:
            continue
        rule = (
            f"makes {microbatches} micro-batches per data-parallel rank{{}}; the last {rest} cannot be "
            f"interleaved over {pp} pipeline stages"
        )
        otherwise = "or leave out the virtual stages"
        if size == args.global_batch_size:
            remedy = f"use --global-batch-size {_next(microbatches, pp) * unit}, {otherwise}"
            return [Problem("--global-batch-size", size, rule.format(""), remedy)]
        remedy = f"use multiples of {pp * unit} as start size and increment, {otherwise}"
        at_size = rule.format(f" at size {size}")
        return [Problem("--rampup-batch-size", args.rampup_batch_size, at_size, remedy)]
    return []


def _batch_sizes(args: Namespace) -> Sequence[int]:
    """Global batch sizes of the run, in order; only the last one where the ramp is not what it should be."""
    ramp, total = args.rampup_batch_size, args.global_batch_size or 0
    if ramp and len(ramp) == 3 and all(isinstance(number, int) and number > 0 for number in ramp):
        return range(ramp[0], total + 1, ramp[1])
    return [total] if total else []


def width_divides(args: Namespace, given: Collection[str]) -> list[Problem]:
    """Tensor parallelism cuts heads, query groups, the MLP and the vocabulary into equal parts."""
    tp = args.tensor_model_parallel_size
    sizes = {
        "--num-attention-heads": args.num_attention_heads,
        "--num-query-groups": args.num_query_groups if args.group_query_attention else None,
        "--ffn-hidden-size": args.ffn_hidden_size,
        "the padded vocabulary": args.padded_vocab_size,
    }
    return [
        Problem(flag, size, f"is not a multiple of {_TP} {tp}", f"use {_next(size, tp)}, or another {_TP}")
        for flag, size in sizes.items()
        if size and size > 0 and tp > 0 and size % tp
    ]


def sequence_divides(args: Namespace, given: Collection[str]) -> list[Problem]:
    """Context ranks get two chunks of a sequence each; sequence parallelism divides their part further."""
    length, cp, tp = args.seq_length, args.context_parallel_size, args.tensor_model_parallel_size
    if not length or length < 1 or cp < 1 or tp < 1:
        return []
    unit, reasons = 1, []
    if cp > 1:
        unit = 2 * cp
        reasons.append(f"two chunks for each of {_CP} {cp}")
    if args.sequence_parallel:
        unit = lcm(unit, cp * tp)
        reasons.append(f"equal parts for {_TP} {tp} under --sequence-parallel")
    if length % unit == 0:
        return []
    rule = f"is not a multiple of {unit}, which makes {' and '.join(reasons)}"
    return [Problem("--seq-length", length, rule, f"use --seq-length {_next(length, unit)}")]


def context_exchange_fits(args: Namespace, given: Collection[str]) -> list[Problem]:
    """Words of the context exchange, and the sizes of its two levels."""
    cp, sizes, kinds = args.context_parallel_size, args.hierarchical_context_parallel_sizes, args.cp_comm_type
    levels = "--hierarchical-context-parallel-sizes"
    known = ("p2p", "all_gather", "a2a", "a2a+p2p")
    problems = [
        Problem("--cp-comm-type", kind, f"is not one of {', '.join(known)}", "for example --cp-comm-type p2p")
        for kind in dict.fromkeys(kinds)
        if kind not in known
    ]
    if args.ulysses_degree_in_cp is not None and (
        args.ulysses_degree_in_cp < 1 or cp % args.ulysses_degree_in_cp
    ):
        rule = f"does not divide {_CP} {cp}"
        problems.append(Problem("--ulysses-degree-in-cp", args.ulysses_degree_in_cp, rule, "use a divisor"))
    if sizes and (min(sizes) < 1 or prod(sizes) != cp):
        rule = f"multiply to {prod(sizes)}, not to {_CP} {cp}"
        remedy = f"for example {levels} {_two_factors(cp)}"
        problems.append(Problem(levels, sizes, rule, remedy))
    if "a2a+p2p" in kinds and cp > 1 and not sizes:
        remedy = f"for example {levels} {_two_factors(cp)}"
        problems.append(Problem("--cp-comm-type", "a2a+p2p", f"needs {levels}", remedy))
    elif "a2a+p2p" in kinds and sizes and len(sizes) != 2:
        rule = "a2a+p2p has two levels: the inner (a2a) and the outer (p2p)"
        problems.append(Problem(levels, sizes, rule, f"for example {levels} {_two_factors(cp)}"))
    return problems


def _two_factors(number: int) -> str:
    inner = max((d for d in range(1, number) if number % d == 0), default=1)
    return f"{number // inner} {inner}"


def state_can_be_gathered(args: Namespace, given: Collection[str]) -> list[Problem]:
    """What is saved of the sharded optimizer travels over groups of CPU processes."""
    stored = args.save or args.load
    if not args.use_distributed_optimizer or args.enable_gloo_process_groups or not stored:
        return []
    flag, rule = "--disable-gloo-process-groups", "the sharded optimizer's state is collected over gloo"
    return [Problem(flag, None, rule, "leave it out, or leave out --save and --load")]


def overlap_has_sequence_parallelism(args: Namespace, given: Collection[str]) -> list[Problem]:
    """Asked of the command line, because one tensor-parallel rank switches --sequence-parallel off."""
    if not args.tp_comm_overlap or "--sequence-parallel" in given:
        return []
    needed = "--sequence-parallel"
    return [Problem("--tp-comm-overlap", None, f"needs {needed}", f"add {needed}, or leave it out")]


RULES = (
    world_divides,
    expert_pipelines_agree,
    virtual_stages_fit,
    layers_divide,
    schedule_fits,
    interleaving_has_full_groups,
    width_divides,
    sequence_divides,
    context_exchange_fits,
    state_can_be_gathered,
    overlap_has_sequence_parallelism,
)
