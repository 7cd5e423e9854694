"""What a release of transformers breaks: the same tests with the installed release and with another, side by side.

The other release is installed alone into a temporary folder, which goes before the installed packages: nothing that is
installed changes. What it requires and the installed packages do not meet is named, as it may be all that breaks.

    python benchmarks/new_release.py
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
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder]
        subprocess.run([*install, f"transformers=={args.release}" if args.release else "transformers<6"], check=True)
        (other,) = distributions(name="transformers", path=[folder])
        missing = unmet(other)
        before = {tests: outcome(tests) for tests in args.tests}
        after = {tests: outcome(tests, folder) for tests in args.tests}
    console = Console()
    console.print(table(version("transformers"), other.version, before, after))
    for line in missing:
        console.print(f"transformers {other.version} requires {line}")
    broken = {test: why for tests in after for test, why in breaks(before[tests], after[tests]).items()}
    for test, why in broken.items():
        console.print(f"{test}: {why}", markup=False, highlight=False)
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


def outcome(tests: str, before: str | None = None) -> Outcome:
    """Run tests in a process of its own, with the folder `before` ahead of the installed packages."""
    print(f"{tests} with the {'other' if before else 'installed'} release", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        path = os.pathsep.join(filter(None, [before, str(ROOT)]))
        run = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", tests],
            cwd=ROOT, env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True,
        )  # fmt: skip
        if not report.is_file():
            return {tests: (run.stdout + run.stderr).strip().splitlines()[-1]}
        return parse(report.read_text(encoding="utf-8"))


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


def table(installed: str, release: str, before: dict[str, Outcome], after: dict[str, Outcome]) -> Table:
    """Return how many tests pass with either release, and how many break, by file."""
    shown = Table(title=f"transformers {release} beside {installed}")
    for title in ("tests", f"pass with {installed}", f"pass with {release}", "break"):
        shown.add_column(title, justify="left" if title == "tests" else "right", overflow="fold")
    for tests, own in before.items():
        passed = [str(sum(why is None for why in each.values())) for each in (own, after[tests])]
        shown.add_row(tests, *passed, str(len(breaks(own, after[tests]))))
    return shown


if __name__ == "__main__":
    sys.exit(main())
