"""An editable install: the package is found from any folder, also from the one that holds the clone."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import hf_attnswap

ROOT = Path(hf_attnswap.__file__).parents[1]
FIND = """
import importlib.util, site, sys
site.addsitedir(sys.argv[1])
print(importlib.util.find_spec("hf_attnswap").origin)
"""


def test_the_folder_of_the_clone_does_not_hide_the_package(tmp_path):
    for needed in ("hatchling", "editables"):
        pytest.importorskip(needed, reason=f"{needed} is not installed")
    clone = tmp_path / "hf_attnswap"  # what `git clone` calls it
    shutil.copytree(ROOT / "hf_attnswap", clone / "hf_attnswap", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone)
    site = tmp_path / "site"
    site.mkdir()
    build = [sys.executable, "-c", f"import hatchling.build; print(hatchling.build.build_editable({str(site)!r}))"]
    wheel = subprocess.run(build, cwd=clone, check=True, capture_output=True, text=True).stdout.split()[-1]
    zipfile.ZipFile(site / wheel).extractall(site)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = subprocess.run(
        [sys.executable, "-c", FIND, str(site)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert run.stdout.strip() == str(clone / "hf_attnswap" / "__init__.py"), run.stderr
