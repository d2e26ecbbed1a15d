"""The record of reads sees every use of an argument or a config field, and takes no copy for a use."""

import copy
import pickle
from argparse import Namespace
from dataclasses import asdict, dataclass, replace

import pytest

from megatron.training.arguments.model_config import field_values
from megatron.training.unread_flags import Reads


@dataclass
class Config:
    width: int = 1
    depth: int = 1

    def __post_init__(self) -> None:
        if self.width < 0:
            raise ValueError("width")


@dataclass
class WiderConfig(Config):
    height: int = 1


class OwnNamespace(Namespace):
    """A namespace class of a user's own."""


@pytest.fixture
def reads():
    record = Reads((Config,))
    yield record
    record.end()


@pytest.mark.parametrize("kind", [Namespace, OwnNamespace])
def test_reads_of_arguments_are_recorded_until_the_end(kind: type, reads: Reads) -> None:
    args = kind(width=1, depth=2)
    reads.begin(args)
    assert isinstance(args, kind) and args == kind(width=1, depth=2)
    assert reads.arguments.isdisjoint({"width", "depth"})
    assert args.width == 1 and getattr(args, "absent", 5) == 5
    args.height = 3
    assert {"width", "absent"} <= reads.arguments and "height" not in reads.arguments
    reads.end()
    assert type(args) is kind and args.depth == 2 and "depth" not in reads.arguments


def test_copies_report_and_pickles_are_plain(reads: Reads) -> None:
    args = Namespace(width=[1])
    reads.begin(args)
    shallow, deep, stored = copy.copy(args), copy.deepcopy(args), pickle.loads(pickle.dumps(args))
    assert "width" not in reads.arguments and not reads.handed_out
    assert type(stored) is Namespace and stored.width == [1]
    assert "width" not in reads.arguments
    assert shallow.width is args.__dict__["width"] and deep.width == [1] and deep.width is not shallow.width
    assert "width" in reads.arguments


def test_a_mapping_in_other_hands_may_have_been_read(reads: Reads) -> None:
    args = Namespace(width=1)
    reads.begin(args)
    field_values(Config, args, {})  # of this package: a copy
    assert not reads.handed_out
    assert dict(**vars(args)) == {"width": 1}
    assert reads.handed_out


def test_reads_of_config_fields_are_recorded(reads: Reads) -> None:
    reads.begin(Namespace())
    config = WiderConfig(width=2)
    repr(config), config == WiderConfig(), replace(config, depth=3), asdict(config), copy.deepcopy(config)
    assert reads.fields.isdisjoint({"width", "depth", "height"})
    assert config.width + config.height == 3
    assert {"width", "height"} <= reads.fields and "depth" not in reads.fields
    reads.end_configs()
    assert config.depth == 1 and "depth" not in reads.fields


def test_config_classes_are_as_before_afterwards() -> None:
    before = dict(vars(Config))
    reads = Reads((Config,))
    reads.begin(Namespace())
    with pytest.raises(ValueError):
        Config(width=-1)
    assert vars(Config)["__post_init__"] is not before["__post_init__"]
    reads.end()
    reads.end()
    assert dict(vars(Config)) == before
