"""Rules about the shape of the model and its number formats."""

from argparse import Namespace
from collections.abc import Collection

from megatron.training.arguments.problem import Problem
from megatron.training.arguments.values import suggestion

RECOMPUTE_MODULES = ("core_attn", "layernorm", "mlp", "moe_act", "mla_up_proj", "moe")


def sizes_are_given(args: Namespace, given: Collection[str]) -> list[Problem]:
    """Sizes without which there is no model."""
    needed = {
        "--num-layers": (args.num_layers, 12),
        "--hidden-size": (args.hidden_size, 768),
        "--num-attention-heads": (args.num_attention_heads, 12),
        "--seq-length": (args.seq_length, 1024),
        "--max-position-embeddings": (args.max_position_embeddings, args.seq_length or 1024),
        "--micro-batch-size": (args.micro_batch_size, 1),
    }
    return [
        Problem(flag, None, "is required", f"for example {flag} {example}")
        for flag, (size, example) in needed.items()
        if size is None
    ]


def one_name_for_one_size(args: Namespace, given: Collection[str]) -> list[Problem]:
    """--num-layers and --seq-length have a second spelling; the two may not differ."""
    problems = []
    for name, twin in (("num_layers", "encoder_num_layers"), ("seq_length", "encoder_seq_length")):
        size, other = getattr(args, name), getattr(args, twin)
        if size != other:
            flag, twin_flag = _flag(name), _flag(twin)
            problems.append(
                Problem(twin_flag, other, f"differs from {flag} {size}, the same thing", "give one of them")
            )
    return problems


def heads_fit(args: Namespace, given: Collection[str]) -> list[Problem]:
    """Heads divide the width, query groups divide the heads."""
    hidden, heads, groups = args.hidden_size, args.num_attention_heads, args.num_query_groups
    problems = []
    if not heads or heads < 1:
        return problems
    if hidden and args.kv_channels is None and hidden % heads:
        wider, fewer = (hidden // heads + 1) * heads, _nearest_divisor(hidden, heads)
        problems.append(
            Problem(
                "--hidden-size",
                hidden,
                f"is not a multiple of --num-attention-heads {heads}",
                f"use --hidden-size {wider} or --num-attention-heads {fewer}, or set the width of a head "
                "with --kv-channels",
            )
        )
    if args.group_query_attention and groups and groups > 0 and heads % groups:
        problems.append(
            Problem(
                "--num-query-groups",
                groups,
                f"does not divide --num-attention-heads {heads}",
                f"use --num-query-groups {_nearest_divisor(heads, groups)}",
            )
        )
    return problems


def one_activation(args: Namespace, given: Collection[str]) -> list[Problem]:
    """At most one kind of MLP is asked for, and its halves are whole."""
    kinds = {
        "--swiglu": args.swiglu,
        "--geglu": args.geglu,
        "--gelu-tanh": args.gelu_tanh,
        "--squared-relu": args.squared_relu,
        "--is-x-model": args.is_x_model,
    }
    asked = [flag for flag, on in kinds.items() if on]
    problems = []
    if len(asked) > 1:
        problems.append(
            Problem(asked[0], None, f"is a different activation than {' and '.join(asked[1:])}", "keep one")
        )
    # An even width has been halved by now; an odd one is left as it was given.
    if args.is_x_model and not args.glu_gate_last and args.ffn_hidden_size:
        problems.append(
            Problem(
                "--ffn-hidden-size",
                args.ffn_hidden_size,
                "must be even: it counts both halves of the gated MLP of --is-x-model",
                f"use --ffn-hidden-size {args.ffn_hidden_size + 1}",
            )
        )
    return problems


def positions_fit(args: Namespace, given: Collection[str]) -> list[Problem]:
    """Positions reach over the sequence, and rotary flags agree."""
    problems = []
    limit = args.max_position_embeddings
    for name in ("seq_length", "decoder_seq_length"):
        length = getattr(args, name)
        if limit is not None and length is not None and length > limit:
            problems.append(
                Problem(
                    "--max-position-embeddings",
                    limit,
                    f"is smaller than {_flag(name)} {length}",
                    f"use --max-position-embeddings {length}",
                )
            )
    rope = args.position_embedding_type == "rope"
    if not args.add_position_embedding and not rope and args.position_embedding_type != "none":
        problems.append(
            Problem(
                "--no-position-embedding",
                None,
                "only goes with rotary positions",
                "use --position-embedding-type none (or rope)",
            )
        )
    if rope and args.rotary_interleaved and args.apply_rope_fusion:
        problems.append(Problem("--rotary-interleaved", None, "has no fused kernel", "add --no-rope-fusion"))
    if rope and args.kv_channels and 0 < args.rotary_percent <= 1:
        rotated = int(args.kv_channels * args.rotary_percent)
        if rotated < 2 or rotated % 2:
            problems.append(
                Problem(
                    "--position-embedding-type",
                    "rope",
                    f"rotates pairs, but would rotate {rotated} of the {args.kv_channels} channels of a head",
                    "choose --kv-channels and --rotary-percent so that the number is even",
                )
            )
    return problems


def recompute_is_complete(args: Namespace, given: Collection[str]) -> list[Problem]:
    """Full recompute needs a method; selective recompute takes none."""
    problems = []
    if args.recompute_granularity == "full" and args.recompute_method is None:
        problems.append(
            Problem(
                "--recompute-granularity",
                "full",
                "needs a method",
                "add --recompute-method uniform (or block)",
            )
        )
    if args.recompute_granularity == "selective":
        for flag, asked in (
            ("--recompute-method", args.recompute_method),
            ("--recompute-num-layers", args.recompute_num_layers),
        ):
            if asked is not None:
                rule = "has no meaning with selective recompute"
                problems.append(
                    Problem(flag, asked, rule, "leave it out, or use --recompute-granularity full")
                )
    for module in args.recompute_modules or ():
        if module not in RECOMPUTE_MODULES:
            rule = f"is not one of {', '.join(RECOMPUTE_MODULES)}{suggestion(module, RECOMPUTE_MODULES)}"
            problems.append(Problem("--recompute-modules", module, rule))
    return problems


def spec_is_a_name(args: Namespace, given: Collection[str]) -> list[Problem]:
    """--spec is the word local, or a module path and a name in it."""
    words = args.spec
    if words is None or len(words) == 2 or list(words) == ["local"]:
        return []
    return [
        Problem(
            "--spec",
            words,
            f"takes a module path and a name, or the word local; got {len(words)} words",
            "for example --spec megatron.core.models.gpt.gpt_layer_specs get_gpt_layer_local_spec",
        )
    ]


def deterministic_kernels(args: Namespace, given: Collection[str]) -> list[Problem]:
    """Kernels without a deterministic form."""
    if "--deterministic-mode" not in given:
        return []
    asked = {
        "--use-flash-attn": args.use_flash_attn,
        "--cross-entropy-loss-fusion": args.cross_entropy_loss_fusion,
    }
    return [
        Problem(flag, None, "has no deterministic form", "leave it out, or leave out --deterministic-mode")
        for flag, on in asked.items()
        if on
    ]


def loss_scale_has_room(args: Namespace, given: Collection[str]) -> list[Problem]:
    """A scale that is searched for begins at its floor or above."""
    first, floor = args.initial_loss_scale, args.min_loss_scale
    if not args.fp16 or args.loss_scale is not None or first >= floor:
        return []
    rule = f"is below --min-loss-scale {floor:g}"
    return [
        Problem("--initial-loss-scale", f"{first:g}", rule, f"use --initial-loss-scale {floor:g} or more")
    ]


def _flag(dest: str) -> str:
    return "--" + dest.replace("_", "-")


def _nearest_divisor(number: int, near: int) -> int:
    for distance in range(near):
        for candidate in (near - distance, near + distance):
            if number % candidate == 0:
                return candidate
    return 1


RULES = (
    sizes_are_given,
    one_name_for_one_size,
    heads_fit,
    one_activation,
    positions_fit,
    recompute_is_complete,
    spec_is_a_name,
    deterministic_kernels,
    loss_scale_has_room,
)
