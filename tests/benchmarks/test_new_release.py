"""The script that tells what a release of transformers breaks, on reports that are written here."""

import io

from rich.console import Console

PASSED = '<testcase classname="tests.test_a" name="test_one"/>'
BROKEN = (
    '<testcase classname="tests.test_a" name="test_one"><failure message="TypeError: x&#10;more">t</failure></testcase>'
)
ALWAYS = '<testcase classname="tests.test_a" name="test_two"><error message="boom">t</error></testcase>'
SKIPPED = '<testcase classname="tests.test_a" name="test_three"><skipped message="no GPU"/></testcase>'


def report(*cases: str) -> str:
    return f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>"


def test_what_breaks_is_what_passed_before(script):
    told = script("benchmarks/new_release")
    before, after = told.parse(report(PASSED, ALWAYS, SKIPPED)), told.parse(report(BROKEN, ALWAYS, SKIPPED))
    assert before == {"tests.test_a::test_one": None, "tests.test_a::test_two": "boom"}
    assert told.breaks(before, after) == {"tests.test_a::test_one": "TypeError: x"}
    console = Console(file=io.StringIO(), width=100)
    console.print(told.table("5.23.0", "5.24.0", before, after))
    row = console.file.getvalue().splitlines()[-2]
    assert [cell.strip() for cell in row.split("│")[1:-1]] == ["tests.test_a", "0", "1", "1"]


def test_what_fails_with_the_other_release_runs_again(script, tmp_path, capfd):
    """A folder ahead of the installed packages stands for the release; the second run is of what failed alone."""
    told = script("benchmarks/new_release")
    (tmp_path / "release").mkdir()
    (tmp_path / "release" / "released.py").touch()
    tests = tmp_path / "test_it.py"
    tests.write_text(
        "def test_same(): pass\ndef test_new():\n    try: import released\n    except ImportError: return\n    1 / 0\n"
    )
    told.ROOT = tmp_path
    after = told.outcome([str(tests)], "new", tmp_path, str(tmp_path / "release"))
    before = told.outcome([str(tests)], "old", tmp_path)
    assert before == {"test_it::test_new": None}
    assert told.breaks(before, after) == {"test_it::test_new": "ZeroDivisionError: division by zero"}
    assert "test_it.py .F" in capfd.readouterr().err


def test_a_run_without_tests_is_no_success(script, tmp_path):
    told = script("benchmarks/new_release")
    told.ROOT = tmp_path
    assert told.outcome(["no_such_file.py"], "none", tmp_path).keys() == {"pytest"}
