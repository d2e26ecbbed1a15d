"""Errors about data sets name the flags by which the data was given."""

from argparse import Namespace

import pytest

from megatron.core.errors import DataError
from megatron.training.utils import naming_source_of_data


@pytest.mark.parametrize(
    ("given", "message", "end"),
    [
        ({"test_data_path": ["x"]}, "no data set x: missing.", "no data set x: missing. (--test-data-path)"),
        ({"data_path": ["x"]}, "a blend names no data set.", "a blend names no data set. (--data-path)"),
        ({"data_path": ["x"]}, "x.idx is cut off", "x.idx is cut off"),
        ({}, "no data set x", "no data set x"),
    ],
)
def test_errors_about_data_sets_end_with_the_flags_that_named_them(given, message: str, end: str) -> None:
    names = ("data_path", "data_args_path", "per_split_data_args_path")
    names += ("train_data_path", "valid_data_path", "test_data_path")
    args = Namespace(**dict.fromkeys(names) | given)
    with pytest.raises(DataError) as error, naming_source_of_data(args):
        raise DataError(message)
    assert str(error.value) == end
