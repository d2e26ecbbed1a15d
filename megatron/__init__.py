"""Names of parts that are not built yet import all the same; see ``megatron.unbuilt``."""

import sys


class _NamesOfUnbuiltParts:
    """The last finder asked for a module: it costs nothing until one is missing."""

    @staticmethod
    def find_spec(fullname, path=None, target=None):
        if not fullname.startswith("megatron."):
            return None
        from megatron import unbuilt

        return unbuilt.find_spec(fullname)


sys.meta_path.append(_NamesOfUnbuiltParts)
