"""Which tests run: those that are slow only where -m names them, those of the recipe also without it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
SLOW = "test_fuzz.py::test_random_shards"
RECIPE = "test_schedule.py::test_dry_run_prints_the_totals_of_the_recipe"
PLAIN = "test_schedule.py::test_adam_runs_on_odd_steps"


@pytest.mark.parametrize(
    "expression, expected",
    [
        ("", {RECIPE, PLAIN}),
        ("not recipe", {PLAIN}),
        ("recipe", {RECIPE}),
        ("slow", {SLOW}),
        ("not recipe and not slow", {PLAIN}),
    ],
)
def test_slow_tests_are_those_that_the_expression_asks_for(expression, expected):
    files = [TESTS / name for name in ("test_fuzz.py", "test_schedule.py")]
    options = ["-m", expression, "--collect-only", "-q", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, *files]
    found = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True).stdout
    collected = set(re.findall(r"(?:tests/)?(test_\S+)$", found, re.MULTILINE))
    assert collected & {SLOW, RECIPE, PLAIN} == expected
