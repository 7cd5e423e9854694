"""What a release of transformers breaks: tests with another release, and those that fail again with the installed one.

The other release is installed alone into a temporary folder, which goes before the installed packages: nothing that is
installed changes. What it requires and the installed packages do not meet is named, as it may be all that breaks. The
tests' own lines go to stderr, file by file, and the report to stdout.

    python benchmarks/new_release.py > report.txt
    python benchmarks/new_release.py 5.24.0 --tests tests/integration/test_hooks.py tests/masks
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import Distribution, PackageNotFoundError, distributions, version
from pathlib import Path
from xml.etree import ElementTree

from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
# What stands on transformers' own code; the rest of the suite goes by its public classes.
TESTS = (
    "tests/integration/test_hooks.py", "tests/integration/test_models.py", "tests/integration/test_caches.py",
    "tests/integration/test_generation.py", "tests/integration/test_saving.py", "tests/integration/test_adapters.py",
    "tests/integration/test_loading_ways.py", "tests/integration/test_transformers_common.py", "tests/masks",
    "tests/training/test_stages.py",
)  # fmt: skip
Outcome = dict[str, str | None]  # by test, its failure in one line; None where it passed


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; return 1 where something passes with the installed release alone, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("release", nargs="?", help="of transformers, such as 5.24.0; left out: the newest 5.x")
    parser.add_argument("--tests", nargs="+", default=TESTS, help="files or folders of tests")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", f"{folder}/release"]
        subprocess.run([*install, f"transformers=={args.release}" if args.release else "transformers<6"], check=True)
        (other,) = distributions(name="transformers", path=[f"{folder}/release"])
        newer, missing = other.version, unmet(other)  # which are read from its folder
        after = outcome(args.tests, f"transformers {newer}", Path(folder), f"{folder}/release")
        before: Outcome = {}
        if any(after.values()):
            before = outcome(args.tests, f"transformers {version('transformers')}", Path(folder))
    console = Console()
    console.print(table(version("transformers"), newer, before, after))
    for line in missing:
        console.print(f"transformers {newer} requires {line}", markup=False, highlight=False, soft_wrap=True)
    broken = breaks(before, after)
    for test, why in broken.items():
        console.print(f"{test}: {why}", markup=False, highlight=False, soft_wrap=True)
    return int(bool(broken))


def unmet(release: Distribution) -> list[str]:
    """What a release requires and the installed packages do not meet, with what is there."""
    lines = []
    for required in map(Requirement, release.requires or ()):
        if required.marker is not None and not required.marker.evaluate({"extra": ""}):
            continue
        try:
            here = version(required.name)
        except PackageNotFoundError:
            here = "none"
        if here == "none" or not required.specifier.contains(here, prereleases=True):
            lines.append(f"{required.name}{required.specifier}, and {here} is installed")
    return lines


def outcome(tests: Sequence[str], title: str, folder: Path, before: str | None = None) -> Outcome:
    """Run tests in a process of its own; where earlier ones in the same folder failed, those alone.

    Args:
        title: says on stderr with what.
        folder: holds which tests failed.
        before: a folder that goes ahead of the installed packages.
    """
    print(f"{title}:", file=sys.stderr, flush=True)
    report = folder / "report.xml"
    report.unlink(missing_ok=True)
    how = ["-o", "addopts=-m 'not long' --tb=no -rN", "-o", f"cache_dir={folder / 'cache'}"]
    how += ["--last-failed", "--continue-on-collection-errors"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *how, f"--junitxml={report}", *tests],
        cwd=ROOT, stdout=sys.stderr,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [before, str(ROOT)])), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    found = parse(report.read_text(encoding="utf-8")) if report.is_file() else {}
    if run.returncode > 1 and not any(found.values()):
        found["pytest"] = f"ended with code {run.returncode} and no failure; stderr has why"
    return found


def parse(report: str) -> Outcome:
    """Read the report of pytest; tests that were skipped are left out."""
    found: Outcome = {}
    for case in ElementTree.fromstring(report).iter("testcase"):
        if case.find("skipped") is None:
            problem = next((case.find(kind) for kind in ("failure", "error") if case.find(kind) is not None), None)
            lines = (problem.get("message") or problem.text or "").strip().splitlines() if problem is not None else []
            why = None if problem is None else lines[0] if lines else "no message"
            found[f"{case.get('classname')}::{case.get('name')}"] = why
    return found


def breaks(before: Outcome, after: Outcome) -> Outcome:
    """Return what fails with the other release and does not with the installed one."""
    return {test: why for test, why in after.items() if why is not None and before.get(test) is None}


def table(installed: str, release: str, before: Outcome, after: Outcome) -> Table:
    """Return by file how many tests pass with the other release, fail with both releases, and break."""
    files: dict[str, Outcome] = {}
    for test, why in after.items():
        files.setdefault(test.partition("::")[0], {})[test] = why
    shown = Table(title=f"transformers {release} beside {installed}")
    for title in ("tests", f"pass with {release}", "fail with both", "break"):
        shown.add_column(title, justify="left" if title == "tests" else "right", overflow="fold")
    for file, own in files.items():
        passed, broken = sum(why is None for why in own.values()), len(breaks(before, own))
        shown.add_row(file, *map(str, (passed, len(own) - passed - broken, broken)))
    return shown


if __name__ == "__main__":
    sys.exit(main())
