"""How Sphinx builds this site: ``pip install -e '.[docs]' && sphinx-build -W docs build/docs``.

Nothing is fetched while it builds or while it is read: no web fonts, no scripts of other hosts.
"""

import os
import pkgutil
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
# The API reference imports the modules it describes; none of them is to look for a device.
os.environ["MEGATRON_DEVICE"] = "cpu"
os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"

project = html_title = "Megatron-NPU"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 3
html_theme = "furo"
html_copy_source = html_show_copyright = html_show_sphinx = False

autodoc_default_options = {"members": True, "show-inheritance": True, "ignore-module-all": True}
autodoc_member_order = "bysource"
# Torch's own docstrings, of methods that are overridden here without one, point into torch's pages.
autodoc_inherit_docstrings = False
napoleon_use_ivar = True  # an attribute in a docstring's list is no second description of a dataclass's field

# Packages whose modules the API reference lists, one page for each package.
API_PACKAGES = ("megatron.core", "megatron.training")


def write_api_pages(app=None) -> None:
    """One page for each package in ``docs/api``, which git ignores: its docstrings, module by module."""
    api = HERE / "api"
    shutil.rmtree(api, ignore_errors=True)
    api.mkdir()
    for top in API_PACKAGES:
        directory = HERE.parent / top.replace(".", "/")
        packages = {top: [top]}
        for module in pkgutil.walk_packages([str(directory)], f"{top}."):
            if "._" not in module.name:
                package = module.name if module.ispkg else module.name.rpartition(".")[0]
                packages.setdefault(package, []).append(module.name)
        for package, modules in packages.items():
            lines = [package, "=" * len(package)]
            for name in modules:
                if name != package:
                    lines += ["", name, "-" * len(name)]
                lines += ["", f".. automodule:: {name}"]
            (api / f"{package}.rst").write_text("\n".join(lines) + "\n", encoding="utf-8")


def leave_out_docstrings_of_torch(app, what, name, obj, options, lines) -> None:
    """The default of a field may be a function of torch, whose description is not that of the field."""
    if str(getattr(obj, "__module__", "")).split(".")[0] == "torch":
        lines.clear()


def setup(app) -> None:
    app.connect("builder-inited", write_api_pages)
    app.connect("autodoc-process-docstring", leave_out_docstrings_of_torch)
