"""Version and addresses of the package.

The version numbers are those of the Megatron core whose interface this package offers, so that version
checks in user scripts pass; the distribution itself has its own version.
"""

MAJOR = 0
MINOR = 12
PATCH = 1
PRE_RELEASE = ""

VERSION = (MAJOR, MINOR, PATCH, PRE_RELEASE)

__shortversion__ = ".".join(map(str, VERSION[:3]))
__version__ = ".".join(map(str, VERSION[:3])) + "".join(VERSION[3:])

__package_name__ = "megatron_core"
__contact_names__ = "Megatron-NPU developers"
__contact_emails__ = ""
__homepage__ = ""
__repository_url__ = ""
__download_url__ = ""
__description__ = (
    "Training of large transformer models on Ascend NPUs, GPUs and CPUs, with Megatron's interface"
)
__license__ = "Apache-2.0"
__keywords__ = "deep learning, language model, transformer, distributed training, NPU, Ascend, GPU, torch"
