"""The run of ``tools/merge_datasets.py``: several ``.bin/.idx`` pairs made into one."""

import argparse
import os

from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder, _IndexReader
from megatron.core.errors import DataError
from megatron.training.preprocessing.output import SUFFIXES, OutputFiles, opened, write_errors_explained


def main(argv: list[str] | None = None) -> None:
    """Merge every data set of a directory, in the order of the names.

    Raises:
        DataError: a file that is half of no pair, no data set, or data sets of different dtypes.
        ConfigError: the output cannot be written.
    """
    parser = argparse.ArgumentParser(description="Join the .bin/.idx data sets of a directory into one.")
    parser.add_argument("--input", required=True, help="directory with nothing but .bin/.idx pairs")
    parser.add_argument("--output-prefix", required=True, help="writes PREFIX.bin and PREFIX.idx")
    parser.add_argument("--multimodal", action="store_true", help="the data sets have modes")
    args = parser.parse_args(argv)
    prefixes = find_pairs(args.input)
    with opened([args.output_prefix]) as output:
        merge(prefixes, output, args.multimodal)
    print(f"Merged {len(prefixes)} data sets into {args.output_prefix}.bin and .idx")


def find_pairs(directory: str) -> list[str]:
    """Prefixes of the data sets in a directory, sorted by name.

    Raises:
        DataError: there is none, or a file has no partner.
    """
    try:
        names = sorted(
            name for name in os.listdir(directory) if not os.path.isdir(os.path.join(directory, name))
        )
    except OSError as error:
        raise DataError(
            f"--input {directory}: {error.strerror}; give the directory of the data sets"
        ) from error
    stems = sorted({os.path.splitext(name)[0] for name in names if name.endswith(SUFFIXES)})
    problems = [f"{name} is neither .bin nor .idx" for name in names if not name.endswith(SUFFIXES)]
    for stem in stems:
        problems += [f"{stem + suffix} is missing" for suffix in SUFFIXES if stem + suffix not in names]
    if problems:
        raise DataError(
            f"--input {directory}: every file must belong to a .bin/.idx pair, but " + "; ".join(problems)
        )
    if not stems:
        raise DataError(f"--input {directory}: there is no .bin/.idx pair in this directory")
    return [os.path.join(directory, stem) for stem in stems]


def merge(prefixes: list[str], output: OutputFiles, multimodal: bool) -> None:
    """Append the data sets to one another.

    Raises:
        DataError: their dtypes differ, one of them cannot be read, or the result cannot be written.
    """
    dtypes = {prefix: _IndexReader(prefix + ".idx", multimodal).dtype for prefix in prefixes}
    first = prefixes[0]
    for prefix, dtype in dtypes.items():
        if dtype != dtypes[first]:
            raise DataError(
                f"{prefix} holds {dtype.__name__} but {first} holds {dtypes[first].__name__}; they come from "
                "tokenizers of different sizes and cannot be merged"
            )
    (target,) = output.unfinished_prefixes()
    joined = 0
    with write_errors_explained(output.directory, lambda: f"{joined} of {len(prefixes)} data sets"):
        builder = IndexedDatasetBuilder(target + ".bin", dtype=dtypes[first], multimodal=multimodal)
        for prefix in prefixes:
            builder.add_index(prefix)
            joined += 1
        builder.finalize(target + ".idx")
        output.publish()
