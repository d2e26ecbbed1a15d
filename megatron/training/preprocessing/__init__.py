"""Text to ``.bin/.idx``: what ``tools/preprocess_data.py`` and ``tools/merge_datasets.py`` do.

``inputs`` finds the files, ``readers`` cuts them into blocks of whole records, ``pool`` gives the blocks to
worker processes, ``records`` parses a block, ``encoding`` turns its texts into packed token arrays, and
``output`` appends these in input order. ``command`` connects these steps.
"""
