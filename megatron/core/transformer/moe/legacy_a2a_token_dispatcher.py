"""The dispatcher of ``alltoall_seq``, the name that most published scripts ask for."""

from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher


class MoEAlltoAllSEQTokenDispatcher(MoEAlltoAllTokenDispatcher):
    """Sends rows from the parts of the sequence that tensor-parallel ranks hold.

    Every token reaches the same experts and gets the same sum as with ``alltoall``, so the exchange is the
    same; unlike the original's, experts need not be split over as many ranks as dense layers.
    """
