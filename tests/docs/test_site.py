"""The site: its drawings are what the code makes, it builds without a warning and asks no other host."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, all_pages

MISSING = [name for name in ("sphinx", "myst_parser", "furo") if importlib.util.find_spec(name) is None]
# Attributes by which a page makes a browser fetch something; plain links are for the reader to follow.
FETCHED = re.compile(r"<(?:link|script|img|iframe|object)\b[^>]*(?:href|src|data)=\"((?:https?:)?//[^\"]+)\"")


def test_drawings_are_what_the_code_makes(tmp_path: Path) -> None:
    environment = os.environ | {"MEGATRON_DEVICE": "cpu"}
    command = [sys.executable, str(ROOT / "docs" / "draw.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    drawn = {path.name: path.read_text() for path in tmp_path.iterdir()}
    kept = {path.name: path.read_text() for path in (ROOT / "docs" / "drawings").iterdir()}
    assert drawn == kept, "python docs/draw.py draws them anew"


def test_every_drawing_is_shown() -> None:
    text = "".join(page.text for page in all_pages())
    assert not [
        path.name
        for path in (ROOT / "docs" / "drawings").iterdir()
        if f"({path.parent.name}/{path.name})" not in text
    ]


@pytest.mark.skipif(bool(MISSING), reason=f"pip install -e '.[docs]' brings {', '.join(MISSING)}")
def test_the_site_builds_without_warnings_and_asks_no_other_host(tmp_path: Path) -> None:
    # From a copy: the build writes the pages of the API reference beside the others.
    shutil.copytree(ROOT / "docs", tmp_path / "docs", ignore=shutil.ignore_patterns("api"))
    for path in ROOT.iterdir():
        if path.name not in ("docs", ".git"):
            (tmp_path / path.name).symlink_to(path)
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "-E", "-d", str(tmp_path / "trees")]
    done = subprocess.run(
        [*command, str(tmp_path / "docs"), str(tmp_path / "site")],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert {path.stem for path in pages} >= {Path(page.name).stem for page in all_pages()}
    reference = (tmp_path / "site" / "api" / "megatron.core.distributed.html").read_text(encoding="utf-8")
    assert "DistributedDataParallel" in reference and "main_grad" in reference
    assert not {url for path in pages for url in FETCHED.findall(path.read_text(encoding="utf-8"))}
    styles = "".join(path.read_text(encoding="utf-8") for path in (tmp_path / "site").rglob("*.css"))
    assert not re.findall(r"(?:url\(|@import)\s*['\"]?(?:https?:)?//", styles)
