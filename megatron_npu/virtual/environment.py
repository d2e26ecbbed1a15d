"""The variables under which a process, and all that it starts, sees virtual NPUs."""

import os
import site
import sys
from pathlib import Path

from megatron_npu.virtual import cann

HERE = Path(__file__).resolve().parent
# Where the package lies: a checkout, or an installation's site-packages.
ROOT = HERE.parents[1]
# Names that torch_npu 2.13.0 knows; drivers of the 950 have many more.
CHIPS = (
    "Ascend910A", "Ascend910ProA", "Ascend910ProB", "Ascend910PremiumA", "Ascend910B",
    "Ascend910B1", "Ascend910B2", "Ascend910B2C", "Ascend910B3", "Ascend910B4", "Ascend910B4-1",
    "Ascend910_9362", "Ascend910_9372", "Ascend910_9381", "Ascend910_9382", "Ascend910_9391",
    "Ascend910_9392", "Ascend310P1", "Ascend310P3", "Ascend310P7", "Ascend310B1", "Ascend310B4",
    "Ascend950DT_9591", "Ascend950PR_9599",
)  # fmt: skip
# torch_npu imports torchrun's module before torchrun runs as a script.
_QUIET = "ignore:'torch.distributed.run' found in sys.modules:RuntimeWarning"


def environment(devices: int, soc: str, memory_gib: float = 64.0) -> dict[str, str]:
    """Variables of a process that sees virtual NPUs; builds the stand-in for CANN.

    Args:
        devices: how many.
        soc: one of CHIPS.
        memory_gib: what each claims to have; host memory is taken only as it is used.

    Raises:
        ConfigError: the stand-in cannot be built.
    """
    home = cann.build()
    return {
        **os.environ,
        "STUB_NPU_COUNT": str(devices),
        "STUB_NPU_SOC": soc,
        "STUB_NPU_MEM": str(int(memory_gib * (1 << 30))),
        # The slash makes env_npu.sh see that CANN is in the environment already.
        "ASCEND_HOME_PATH": str(home),
        "ASCEND_OPP_PATH": str(home / "opp"),
        "LD_LIBRARY_PATH": _before(f"{home}/", "LD_LIBRARY_PATH"),
        "PYTHONPATH": _before(_search_path(), "PYTHONPATH"),
        "PATH": _before(str(Path(sys.executable).parent), "PATH"),
        "PYTHONWARNINGS": ",".join(filter(None, (_QUIET, os.environ.get("PYTHONWARNINGS")))),
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "1",
        # torch_npu logs what it does about the chip, and torch that groups of two back ends have no default.
        "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),
        "MEGATRON_DEVICE": "npu",
        # Host memory and the CPU carry the model.
        "MEGATRON_RECIPE_SIZE": os.environ.get("MEGATRON_RECIPE_SIZE", "small"),
        # Errors come from the call that made them, and no thread of torch_npu's calls kernels.
        "ASCEND_LAUNCH_BLOCKING": "1",
        # Virtual memory is not emulated, and env_npu.sh asks for it unless told otherwise.
        "PYTORCH_NPU_ALLOC_CONF": "expandable_segments:False",
    }


def _search_path() -> str:
    """What Python has to find besides what it finds anyway.

    Site-packages do not belong here: ahead of Python's own directory they would hide its modules.
    """
    installed = {Path(path).resolve() for path in (*site.getsitepackages(), site.getusersitepackages())}
    places = [HERE / "autoload", *([] if ROOT in installed else [ROOT])]
    return os.pathsep.join(map(str, places))


def _before(first: str, variable: str) -> str:
    return os.pathsep.join(filter(None, (first, os.environ.get(variable))))
