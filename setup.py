"""Installation: the packages ``megatron`` and ``megatron_npu``, pure Python, and ``mindspeed`` aside."""

import sys

# Written so that any Python can read it as far as this. Where pip asks for the metadata it says in its own
# words, and in fewer lines than around an error, that python_requires is not met.
asked_by_pip = sys.version_info >= (3,) and {"egg_info", "dist_info"}.intersection(sys.argv)
if sys.version_info < (3, 10) and not asked_by_pip:
    sys.exit("error: Python 3.10 or newer is needed, and this is Python " + sys.version.split()[0])

from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

# What each part needs. Only CORE is imported unless a flag or a file asks for more; the code that does
# says which extra to install when the import fails.
CORE = [
    # The upper end is the newest version the tests have run with.
    "torch>=2.6,<=2.13.0",
    "numpy>=1.26",
    "packaging>=22",
    "tokenizers>=0.20",
    # Preprocessing runs without these two, several times slower.
    "fastokens>=0.3.5,<0.4",
    "orjson>=3.9",
]
EXTRAS = {
    # HuggingFace, SentencePiece / Llama2 and TikToken tokenizers
    "tokenizers": ["transformers>=4.45", "sentencepiece>=0.2", "tiktoken>=0.7"],
    # .parquet and .zst input and --split-sentences of tools/preprocess_data.py; --yaml-cfg
    "data": ["pyarrow>=15", "zstandard>=0.22", "nltk>=3.9", "pyyaml>=6"],
    # --tensorboard-dir
    "tensorboard": ["tensorboard>=2.14"],
    # --output of tools/draw_schedule.py
    "plots": ["matplotlib>=3.8"],
    # Ascend NPUs; the version of torch_npu decides the version of torch, and wants CANN to be installed
    "npu": ["torch_npu>=2.6,<=2.13.0"],
}
_FEATURES = ("tokenizers", "data", "tensorboard", "plots")
EXTRAS["all"] = sorted({name for extra in _FEATURES for name in EXTRAS[extra]})
# The real wheel over a stub of CANN, for tests/npu on machines without an NPU. Not part of "test": it is for
# Linux only, pins torch, and where it is installed "import torch" fails without CANN unless
# TORCH_DEVICE_BACKEND_AUTOLOAD=0 is set, as tests/test.sh does.
EXTRAS["npu-test"] = ["torch_npu==2.13.0"]
EXTRAS["test"] = EXTRAS["all"] + ["pytest>=8.4", "pytest-xdist>=3.5", "ruff>=0.17,<0.18", "safetensors>=0.4"]


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


setup(
    name="megatron-npu",
    version="0.12.1.dev0",
    description="Megatron-LM's commands and formats on Ascend NPUs, NVIDIA GPUs and CPUs",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["megatron", "megatron.*", "megatron_npu", "megatron_npu.*", "mindspeed"]),
    # What virtual NPUs compile, and the description of a package that lets torch load them.
    package_data={"megatron_npu.virtual": ["cann_sources/*.c", "autoload/*/*"]},
    cmdclass={"build_py": BuildBesideMindSpeed},
    install_requires=CORE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["megatron-npu = megatron.cli.command:main"]},
)
