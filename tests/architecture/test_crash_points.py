"""Every place of the list is passed somewhere, and every place that is passed is on the list; what a process is told
there it does."""

import ast
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from bon_algos.crash_points import ARCHIVE_POINTS, COMMAND_POINTS, CRASH_AT, GATEWAY_POINTS, WORKER_POINTS

ROOT = Path(__file__).parents[2]


POINTS = (*GATEWAY_POINTS, *WORKER_POINTS, *ARCHIVE_POINTS, *COMMAND_POINTS)


def places(*packages: str) -> Counter[str]:
    """Every string in them that has the form of a place, whether it is passed directly or through `staged`."""
    names = set(POINTS)
    found: Counter[str] = Counter()
    for path in (path for package in packages for path in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "crash_point":
                found.update(str(one.value) for one in node.args if isinstance(one, ast.Constant))
            elif isinstance(node, ast.Tuple):
                said = [one.value for one in node.elts if isinstance(one, ast.Constant)]
                found.update(str(name) for name in said if name in names)
    return found


def test_each_place_is_in_the_code_once():
    assert places("archive", "bonsai", "service", "worker") == Counter(POINTS)


@pytest.mark.parametrize(("asked", "passed"), [("beat.asked", 0), ("beat.asked:3", 2), ("claim.asked", 9)])
def test_a_process_dies_at_the_pass_it_was_told_and_no_other(asked, passed):
    code = (
        "from bon_algos.crash_points import crash_point\n"
        "for number in range(9):\n    crash_point('beat.asked')\n    print(number, flush=True)"
    )
    done = subprocess.run([sys.executable, "-c", code], env={CRASH_AT: asked}, cwd=ROOT, capture_output=True)
    assert len(done.stdout.split()) == passed
    assert done.returncode == (0 if passed == 9 else -9)


def test_a_process_that_was_told_nothing_lives():
    code = "from bon_algos.crash_points import crash_point; crash_point('beat.asked')"
    assert subprocess.run([sys.executable, "-c", code], env={}, cwd=ROOT).returncode == 0
