"""From text to ``.bin/.idx``: what ``tools/preprocess_data.py`` and ``tools/merge_datasets.py`` do.

The way of a document: ``inputs`` names the files, ``readers`` cuts them into blocks of whole records,
``pool`` hands the blocks to worker processes, ``records`` parses a block, ``encoding`` turns its texts into
packed token arrays, and ``writer`` appends these in input order. ``command`` ties the rooms together.
"""
