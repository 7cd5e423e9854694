"""The package as it is installed: found from any folder, and with all that it imports."""

import ast
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import hf_attnswap

ROOT = Path(hf_attnswap.__file__).parents[1]
GIVEN = {"deepspeed"}  # imported only where accelerate runs a model in it, and so is there
COMES_WITH = {"markupsafe": "jinja2", "pydantic-core": "pydantic"}  # each a part of the other
# Run with -S: the package that is under test is installed too, and must not be found in place of the one made here.
FIND = """
import importlib.util, site, sys
sys.path.append(sys.argv[2])
site.addsitedir(sys.argv[1])
print(importlib.util.find_spec("hf_attnswap").origin)
"""


def test_the_folder_of_the_clone_does_not_hide_the_package(tmp_path):
    for needed in ("hatchling", "editables"):
        pytest.importorskip(needed, reason=f"{needed} is not installed")
    clone = tmp_path / "hf_attnswap"  # what `git clone` calls it
    shutil.copytree(ROOT / "hf_attnswap", clone / "hf_attnswap", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone)
    site = tmp_path / "site"
    site.mkdir()
    build = [sys.executable, "-c", f"import hatchling.build; print(hatchling.build.build_editable({str(site)!r}))"]
    quick = {**os.environ, "CXX": "no-compiler"}
    wheel = subprocess.run(build, cwd=clone, env=quick, check=True, capture_output=True, text=True).stdout.split()[-1]
    zipfile.ZipFile(site / wheel).extractall(site)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    libraries = str(Path(importlib.util.find_spec("editables").origin).parents[1])
    find = [sys.executable, "-S", "-c", FIND, str(site), libraries]
    run = subprocess.run(find, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.stdout.strip() == str(clone / "hf_attnswap" / "__init__.py"), run.stderr


def test_what_is_imported_is_declared_and_what_is_declared_is_imported():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = ("demo", "finetune", "eval")
    listed = {e: {_name(line) for line in project["optional-dependencies"][e]} for e in extras}
    declared = {_name(line) for line in project["dependencies"]}
    distributions = importlib.metadata.packages_distributions()
    imported = set()
    for path in (ROOT / "hf_attnswap").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.partition(".")[0])
    imported -= {"hf_attnswap", *sys.stdlib_module_names}
    needed = {_name(distributions.get(name, [name])[0]) for name in imported}
    needed = {COMES_WITH.get(name, name) for name in needed}
    needed -= GIVEN
    assert needed <= declared.union(*listed.values()), "imported, and not declared"
    assert declared <= needed, "declared, and not imported"


def _name(requirement: str) -> str:
    return re.match(r"[A-Za-z0-9_.-]+", requirement)[0].lower().replace("_", "-")
