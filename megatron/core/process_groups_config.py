"""Holders of process groups, for code that hands groups on instead of asking ``parallel_state``.

The fields are set after construction; reading one that was not set is an AttributeError.
"""

from dataclasses import dataclass, field

from torch.distributed import ProcessGroup

# ---- For scripts written for Megatron-LM: nothing in this project calls what follows ----


@dataclass
class ModelCommProcessGroups:
    """Groups that layers talk over: ``holder = ModelCommProcessGroups(); holder.tp = group``."""

    tp: ProcessGroup = field(init=False)
    """tensor parallel"""
    pp: ProcessGroup = field(init=False)
    """pipeline parallel"""
    mp: ProcessGroup = field(init=False)
    """tensor and pipeline parallel together"""
    embd: ProcessGroup = field(init=False)
    """ranks with a copy of the word embedding"""
    pos_embd: ProcessGroup = field(init=False)
    """ranks with a copy of the position embedding"""
    cp: ProcessGroup = field(init=False)
    """context parallel"""
    tp_cp: ProcessGroup = field(init=False)
    """tensor and context parallel together"""
    hcp: list[ProcessGroup] = field(init=False)
    """nested context-parallel groups, one per level"""
    ep: ProcessGroup = field(init=False)
    """expert parallel"""
    expt_tp: ProcessGroup = field(init=False)
    """tensor parallel inside experts"""
    tp_ep: ProcessGroup = field(init=False)
    """tensor parallel inside experts and expert parallel together"""
    tp_ep_pp: ProcessGroup = field(init=False)
    """the same and pipeline parallel together"""


@dataclass
class GradCommProcessGroups:
    """Groups that gradients are reduced over; set like those of :class:`ModelCommProcessGroups`."""

    dp: ProcessGroup = field(init=False)
    """data parallel"""
    dp_cp: ProcessGroup = field(init=False)
    """data and context parallel together"""
    expt_dp: ProcessGroup = field(init=False)
    """data parallel of expert weights"""
    intra_dp_cp: ProcessGroup = field(init=False)
    """ranks of one instance of the distributed optimizer"""
    inter_dp_cp: ProcessGroup = field(init=False)
    """equal shards of the instances of the distributed optimizer"""
