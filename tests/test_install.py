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
from hf_attnswap import native
from hf_attnswap.native import build

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


@pytest.fixture
def clone(tmp_path):
    """A copy of what packages are made of, without a library of kernels, in the folder that `git clone` makes."""
    for needed in ("hatchling", "editables"):
        pytest.importorskip(needed, reason=f"{needed} is not installed")
    clone = tmp_path / "hf_attnswap"
    shutil.copytree(ROOT / "hf_attnswap", clone / "hf_attnswap", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone)
    return clone


def built(clone: Path, how: str, compiler: str) -> tuple[Path, str]:
    """The wheel that `hatchling.build.build_wheel`, or `build_editable`, makes, and what it prints."""
    dist = clone.parent / "dist"
    dist.mkdir()
    code = f"import hatchling.build; print(hatchling.build.{how}({str(dist)!r}))"
    environment = {**os.environ, "CXX": compiler}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=clone, env=environment, check=True, capture_output=True, text=True
    )
    return dist / run.stdout.split()[-1], run.stdout + run.stderr


def installed(wheel: Path) -> Path:
    """A folder with what the wheel holds, as installers lay it out."""
    site = wheel.parent / "site"
    zipfile.ZipFile(wheel).extractall(site)
    return site


def test_the_folder_of_the_clone_does_not_hide_the_package(clone, tmp_path):
    site = installed(built(clone, "build_editable", "no-compiler")[0])
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    libraries = str(Path(importlib.util.find_spec("editables").origin).parents[1])
    find = [sys.executable, "-S", "-c", FIND, str(site), libraries]
    run = subprocess.run(find, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.stdout.strip() == str(clone / "hf_attnswap" / "__init__.py"), run.stderr


SOURCES = {f"hf_attnswap/native/src/{path.name}" for path in (ROOT / "hf_attnswap" / "native" / "src").iterdir()}


def test_a_wheel_with_the_kernels_is_for_one_platform_and_any_python(clone):
    if native.missing():
        pytest.skip(native.missing())
    shutil.copy(native.LIBRARY, clone / "hf_attnswap" / "native")  # built already: nothing is compiled
    wheel, _ = built(clone, "build_wheel", "no-compiler" if build.compiler() is None else build.compiler()[0])
    assert re.fullmatch(r"hf_attnswap-[\d.]+-py3-none-\w+", wheel.stem) and not wheel.stem.endswith("any")
    files = set(zipfile.ZipFile(wheel).namelist())
    assert files >= SOURCES | {"hf_attnswap/native/kernels.so", "hf_attnswap/native/build.py"}


@pytest.mark.long
def test_a_wheel_is_compiled_and_runs(clone):
    if build.compiler() is None:
        pytest.skip("no C++ compiler is installed")
    wheel, said = built(clone, "build_wheel", build.compiler()[0])
    assert "without CPU kernels" not in said
    run = attention_of(installed(wheel))
    assert run.stdout.split() == ["cpu"] and "backend" not in run.stderr


def test_a_wheel_without_a_compiler_is_for_any_platform(clone):
    (clone / "hf_attnswap" / "native" / "kernels.so").write_bytes(b"of other sources")
    wheel, said = built(clone, "build_wheel", "/bin/false")
    assert "hf_attnswap is installed without CPU kernels: /bin/false" in said
    assert wheel.name.endswith("-py3-none-any.whl")
    files = set(zipfile.ZipFile(wheel).namelist())
    assert files >= SOURCES and "hf_attnswap/native/kernels.so" not in files


@pytest.mark.long
def test_a_wheel_without_kernels_runs_and_says_so_once(clone):
    run = attention_of(installed(built(clone, "build_wheel", "/bin/false")[0]))
    assert run.stdout.split() == ["torch"]
    assert [line for line in run.stderr.splitlines() if "backend" in line] == [
        "backend torch runs, not cpu: the CPU kernels are not built (python -m hf_attnswap.native builds them)"
    ]


def attention_of(site: Path) -> subprocess.CompletedProcess:
    """Several ops of the package in this folder; prints which backend ran."""
    environment = {**os.environ, "PYTHONPATH": str(site)}
    environment.pop("HF_ATTNSWAP_BACKEND", None)
    run = [sys.executable, "-c", RUN]
    return subprocess.run(run, cwd=site.parent, env=environment, check=True, capture_output=True, text=True)


RUN = """
import torch
from hf_attnswap.attentions.elu import ELU
from hf_attnswap.ops.backends import watch
from hf_attnswap.ops.gated import causal_gated
from hf_attnswap.ops.linear import causal_linear
x = torch.rand(1, 1, 5, 8)
with watch() as ran:
    for _ in range(2):
        causal_linear(x, x, x, ELU, ELU)
        causal_gated(x, x, x, -torch.rand(1, 1, 5))
print(*set.union(*ran.values()))
"""


class Told:
    """Hatch's terminal."""

    def __init__(self):
        self.display_info, self.infos = (lambda line: self.infos.append(line)), []
        self.display_warning, self.warnings = (lambda line: self.warnings.append(line)), []


@pytest.mark.parametrize("reason", (None, "no C++ compiler was found"))
def test_the_build_hook(tmp_path, reason):
    """A wheel with kernels is for this platform; one without takes no library along that lay there, and says so."""
    pytest.importorskip("hatchling", reason="hatchling is not installed")
    folder = tmp_path / "hf_attnswap" / "native"
    folder.mkdir(parents=True)
    (folder / "kernels.so").write_bytes(b"")
    (folder / "build.py").write_text(
        "from pathlib import Path\nLIBRARY = Path(__file__).parent / 'kernels.so'\n"
        f"build = lambda: {reason!r}\ninstruction_sets = lambda: {{'avx2': [], 'plain': []}}\n"
    )
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)
    data, told = {"artifacts": []}, Told()
    hook.Kernels(str(tmp_path), {}, None, None, "", "wheel", told).initialize("standard", data)
    assert (folder / "kernels.so").exists() == (reason is None)
    if reason is None:
        assert told.infos == ["built the CPU kernels for avx2, plain"] and not told.warnings
        assert data["tag"].startswith("py3-none-") and not data["pure_python"]
        assert data["artifacts"] == ["hf_attnswap/native/*.so"]
    else:
        assert told.warnings == [f"hf_attnswap is installed without CPU kernels: {reason}"]
        assert data == {"artifacts": []}


@pytest.mark.parametrize(
    ("compiler", "says"),
    (
        ("/bin/false", "/bin/false -O3"),
        ("no-such-compiler", "no C++ compiler was found (CXX, c++, g++, clang++)"),
    ),
)
def test_a_build_that_fails_says_why_and_leaves_nothing(tmp_path, monkeypatch, compiler, says):
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setattr(build, "LIBRARY", tmp_path / "kernels.so")
    assert build.build().startswith(says)
    assert not list(tmp_path.iterdir())


def test_what_is_imported_is_declared_and_what_is_declared_is_imported():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = ("demo", "finetune", "eval", "gpu", "onnx")
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
