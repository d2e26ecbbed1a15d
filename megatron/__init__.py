"""Megatron-LM's commands and formats on any device.

Every program imports this package before anything else of ours, so the version of Python is checked here,
in words that Python 2.7 and all after it can read.
"""

import sys

if sys.version_info < (3, 10):
    sys.exit(
        "error: Python 3.10 or newer is needed, and this is Python "
        + sys.version.split()[0]
        + " ("
        + sys.executable
        + "). Start with a newer one, for example with python3.12 in place of python."
    )


class _NamesOfUnbuiltParts:
    """The last finder asked for a module, so it costs nothing until one is missing: see megatron.unbuilt."""

    @staticmethod
    def find_spec(fullname, path=None, target=None):
        if not fullname.startswith("megatron."):
            return None
        from megatron import unbuilt

        return unbuilt.find_spec(fullname)


sys.meta_path.append(_NamesOfUnbuiltParts)
