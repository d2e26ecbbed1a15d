"""What pyproject.toml cannot say: a message to older Pythons, and where ``mindspeed`` is installed."""

import sys

# Written so that any Python can read it as far as this. Where pip asks for the metadata it says in its own
# words, and in fewer lines than around an error, that python_requires is not met.
asked_by_pip = sys.version_info >= (3,) and {"egg_info", "dist_info"}.intersection(sys.argv)
if sys.version_info < (3, 10) and not asked_by_pip:
    sys.exit("error: Python 3.10 or newer is needed, and this is Python " + sys.version.split()[0])

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

# The setuptools of an older Python may not read pyproject.toml, and pip would take that for no requirement.
requirement = {"name": "megatron-npu", "python_requires": ">=3.10"} if sys.version_info < (3, 10) else {}


class BuildBesideMindSpeed(build_py):
    """Installs ``mindspeed``, which stands in for a package of others, where it overwrites nothing of theirs.

    A wheel has it in a directory of its own at the end of the search path; an editable installation maps it
    where it is.
    """

    stand_ins = ("megatron_npu", "stand_ins")

    def get_module_outfile(self, build_dir, package, module):
        if package[0] == "mindspeed" and not self.editable_mode:
            package = list(self.stand_ins) + list(package)
        return super().get_module_outfile(build_dir, package, module)

    def run(self):
        super().run()
        if not self.editable_mode:
            search_path = Path(self.build_lib, "_".join(self.stand_ins) + ".pth")
            search_path.write_text("/".join(self.stand_ins) + "\n", encoding="utf-8")


# Of "Apache-2.0" and {text = "Apache-2.0"} in pyproject.toml, the setuptools of older Pythons refuses the
# one, and newer ones will refuse the other.
setup(license="Apache-2.0", cmdclass={"build_py": BuildBesideMindSpeed}, **requirement)
