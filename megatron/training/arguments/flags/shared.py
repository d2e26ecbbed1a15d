"""Reasons and conditions that rows of several sections share."""

from argparse import Namespace

from megatron.training.arguments.flag import Accepted, NotBuilt, unless, without


def _without_fused_attention(args: Namespace) -> bool:
    return getattr(args.attention_backend, "name", args.attention_backend) in ("unfused", "local")


def is_gated_by_flag(args: Namespace) -> bool:
    """Whether a flag with a gated activation of its own is on."""
    return args.swiglu or args.geglu or args.gelu_tanh


def loads(args: Namespace) -> object:
    """Whether weights are read from a checkpoint."""
    return args.load or args.pretrained_checkpoint


def _replicas(args: Namespace) -> int:
    """Ranks that hold the same parameters."""
    return args.data_parallel_size * args.context_parallel_size


ALWAYS_SO = Accepted("withdrawn, and without effect: what it asked for is what always happens")
OWN_KERNEL = Accepted(
    "asks for a faster kernel; the device's own is used where there is one, with the same result"
)
OLDER_CLASSES = Accepted("written for older model classes or data formats; the models here do not need it")
NO_MEMORY_SAVER = Accepted(
    "a memory saver that does not exist here: results are the same, memory use is not reduced"
)
ENCODER_MODELS = NotBuilt("training of encoder-decoder and BERT models")
IN_FUSED_ATTENTION = without(
    "--attention-backend unfused: the fused attention does all of it in one operation",
    _without_fused_attention,
)
WEIGHTS_ALONE = unless(lambda a: not a.finetune, "--finetune loads the weights and nothing else")
WITHOUT_REPLICAS = without("several data-parallel ranks", lambda a: _replicas(a) > 1)
OTHER_LIBRARY = Accepted(
    "the library or torch build behind this flag is not used; the device's own communication is"
)
