"""``import mindspeed.megatron_adaptor``: ours answers without MindSpeed, and MindSpeed itself where it is."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OURS = ROOT / "mindspeed"
WHO = "import mindspeed; print(getattr(mindspeed, 'WHO', 'ours'), mindspeed.__name__)"
SAYS = "mindspeed.megatron_adaptor: MindSpeed is not installed and not needed, Megatron-NPU answers: "
# An installed MindSpeed, as its public names go.
REAL = {
    "__init__.py": "WHO = 'real'\n",
    "megatron_adaptor.py": "print('the real adaptor')\n",
    "core/__init__.py": "",
    "core/norm.py": "VALUE = 3\n",
}


def python(code: str, *search_path: Path, **more: str) -> subprocess.CompletedProcess:
    """``python -c CODE`` with a search path, on a machine without accelerators."""
    env = {
        key: value for key, value in os.environ.items() if key not in ("RANK", "SLURM_PROCID", "WORLD_SIZE")
    }
    env |= {"MEGATRON_DEVICE": "cpu", "PYTHONPATH": os.pathsep.join(map(str, search_path)), **more}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=env, cwd="/", text=True, capture_output=True, check=False)


def write(directory: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = directory / "mindspeed" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return directory


def test_the_first_line_of_a_script_is_answered_in_one_line() -> None:
    code = "import mindspeed.megatron_adaptor; from mindspeed import megatron_adaptor; print('ran')"
    done = python(code, ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "ran\n"
    assert done.stderr == f"{SAYS}nothing is replaced, MEGATRON_DEVICE=cpu\n"


@pytest.mark.parametrize("word", ["RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK"])
def test_only_rank_zero_prints_the_line(word: str) -> None:
    # The line is a function of its own, so this needs no torch.
    code = "from megatron_npu.adapting import say; say('spoken')"
    assert python(code, ROOT, **{word: "1"}).stderr == ""
    assert python(code, ROOT, **{word: "0"}).stderr == "spoken\n"


def test_processes_that_a_rank_starts_say_nothing(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import multiprocessing\n"
        "from megatron_npu.adapting import say\n"
        "say('spoken')\n"
        "if __name__ == '__main__':\n"
        "    child = multiprocessing.get_context('spawn').Process(target=print, args=('child',))\n"
        "    child.start()\n"
        "    child.join()\n"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, str(script)], env=env, text=True, capture_output=True, check=True)
    assert (done.stdout, done.stderr) == ("child\n", "spoken\n")


@pytest.mark.parametrize("first", ["ours", "real"])
def test_the_real_package_wins_in_any_order(tmp_path: Path, first: str) -> None:
    real = write(tmp_path, REAL)
    order = (ROOT, real) if first == "ours" else (real, ROOT)
    code = f"{WHO}; import mindspeed.megatron_adaptor; from mindspeed.core import norm; print(norm.VALUE)"
    done = python(code, *order)
    assert done.stdout == "real mindspeed\nthe real adaptor\n3\n", done.stderr
    assert done.stderr == ""


def test_the_real_package_wins_without_an_init_file(tmp_path: Path) -> None:
    real = write(tmp_path, {name: text for name, text in REAL.items() if name != "__init__.py"})
    done = python("import mindspeed.megatron_adaptor, mindspeed.core.norm", ROOT, real)
    assert (done.stdout, done.stderr) == ("the real adaptor\n", "")


def test_the_real_package_wins_when_it_is_installed_for_editing(tmp_path: Path) -> None:
    """Such an installation is known to a finder, and stands on no search path."""
    real = write(tmp_path, REAL) / "mindspeed"
    finder = f"""
import importlib.util, sys
class Editable:
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name == "mindspeed":
            return importlib.util.spec_from_file_location(
                name, {str(real / "__init__.py")!r}, submodule_search_locations=[{str(real)!r}])
sys.meta_path.append(Editable)
"""
    done = python(f"{finder}\n{WHO}\nimport mindspeed.megatron_adaptor", ROOT)
    assert done.stdout == "real mindspeed\nthe real adaptor\n", done.stderr


def test_a_directory_of_that_name_is_no_package(tmp_path: Path) -> None:
    write(tmp_path, {"notes.txt": "what I think of it"})
    assert python(WHO, tmp_path, ROOT).stdout == "ours mindspeed\n"
    assert python(WHO, ROOT, tmp_path).stdout == "ours mindspeed\n"


def test_two_copies_of_ours_do_not_hand_over_to_each_other(tmp_path: Path) -> None:
    shutil.copytree(OURS, tmp_path / "a" / "mindspeed")
    shutil.copytree(OURS, tmp_path / "b" / "mindspeed")
    assert python(WHO, tmp_path / "a", tmp_path / "b", ROOT).stdout == "ours mindspeed\n"
    real = write(tmp_path / "c", REAL)
    assert python(WHO, tmp_path / "a", tmp_path / "b", ROOT, real).stdout == "real mindspeed\n"


def test_a_broken_installation_fails_with_its_own_error(tmp_path: Path) -> None:
    real = write(tmp_path, REAL | {"__init__.py": "raise ImportError('no torch_npu here')\n"})
    done = python("import mindspeed.megatron_adaptor", ROOT, real)
    assert done.returncode != 0
    assert "no torch_npu here" in done.stderr


def test_other_parts_of_mindspeed_are_named_as_such() -> None:
    code = """
try:
    import mindspeed.core.fusions
except ModuleNotFoundError as error:
    print(error.name, error)
"""
    text = python(code, ROOT).stdout
    assert text.startswith("mindspeed.core mindspeed.core is a part of MindSpeed, which is not installed. ")
    assert "mindspeed.megatron_adaptor" in text


def test_an_installation_overwrites_no_file_of_mindspeed(tmp_path: Path) -> None:
    """In a wheel our package stands aside, at the end of the search path."""
    site_packages = tmp_path / "site-packages"
    build = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(site_packages)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    assert not (site_packages / "mindspeed").exists()
    installed = f"import site; site.addsitedir({str(site_packages)!r}); "
    where = f"{WHO}; print(mindspeed.__file__)"
    done = python(installed + where)
    expected = site_packages / "megatron_npu" / "stand_ins" / "mindspeed" / "__init__.py"
    assert done.stdout == f"ours mindspeed\n{expected}\n", done.stderr
    write(site_packages, REAL)
    assert python(installed + WHO).stdout == "real mindspeed\n"
