"""The table of the public records in records/README.md, and that every number that names one of them is in it."""

import ast
import csv
import io
import re
import tokenize
from datetime import date, datetime
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SOURCE = ROOT.parent / "shared" / "history.tsv"  # not in the repository: what the table was made from
NUMBERS = re.compile(r"(?<![\w\])])\[(\d+(?:, \d+)*)\]")  # [58] or [62, 83], but not the index of anything
AGAIN = 21  # the record that was timed again, later and more slowly


class Row(NamedTuple):
    number: int
    date: str
    minutes: str
    what: str
    who: str

    @property
    def day(self) -> date:
        return datetime.strptime(self.date, "%m/%d/%y").date()


def section() -> str:
    text = (ROOT / "records" / "README.md").read_text(encoding="utf-8")
    _, heading, rest = text.partition("\n## The public history\n")
    assert heading, "records/README.md has no such section"
    return rest.partition("\n## ")[0]


def history() -> list[Row]:
    lines = [line for line in section().splitlines() if line.startswith("|")]
    assert lines[0] == "| # | date | minutes | what was new | who |"
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]
    return [Row(int(number), *rest) for number, *rest in cells]


def timed_again() -> list[tuple[str, str]]:
    """Minutes and date of each later timing of record AGAIN, as the sentence below the table has them."""
    sentence = re.search(rf"^Record {AGAIN} was timed again: .*?\.$", section(), re.MULTILINE | re.DOTALL)[0]
    return re.findall(r"(\d+\.\d+)\s(?:minutes\s)?on\s(\d\d/\d\d/\d\d)", sentence)


def as_numbers(lists: list[str]) -> set[int]:
    return {int(number) for numbers in lists for number in numbers.split(", ")}


# ---- The table -------------------------------------------------------------------------------------------------------


def test_every_record_has_one_row_in_order():
    assert [row.number for row in history()] == list(range(1, 90))


def test_dates_never_go_back():
    days = [row.day for row in history()]
    assert days == sorted(days)
    assert days[0] == date(2024, 5, 28) and days[-1] == date(2026, 7, 17)
    again = [datetime.strptime(day, "%m/%d/%y").date() for _, day in timed_again()]
    assert [days[AGAIN - 1], *again, days[AGAIN]] == sorted([days[AGAIN - 1], *again, days[AGAIN]])


def test_every_record_is_faster_than_the_one_before_as_it_was_timed_last():
    rows, again = history(), timed_again()
    assert all(re.fullmatch(r"\d+(\.\d+)?", row.minutes) for row in rows)
    minutes = [float(row.minutes) for row in rows]
    slower = [row.number for row, before, own in zip(rows[1:], minutes, minutes[1:]) if own >= before]
    assert slower == [AGAIN + 1]
    assert len(again) == 2 and minutes[AGAIN - 1] < float(again[0][0]) and minutes[AGAIN] < float(again[1][0])
    assert minutes[0] == 45 and minutes[-1] == 1.23


def test_rows_say_briefly_what_was_new_and_who_did_it():
    for row in history():
        assert 0 < len(row.what) <= 60, row
        assert re.fullmatch(r"@[\w.-]+( @[\w.-]+)*", row.who) or (row.number, row.who) == (66, ""), row


def test_it_is_not_a_table_of_the_leaderboard_command():
    assert "<!--" not in section()


@pytest.mark.skipif(not SOURCE.exists(), reason="the list that the table was made from is not there")
def test_numbers_dates_minutes_and_names_are_the_sources():
    with SOURCE.open(encoding="utf-8", newline="") as file:
        source = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    first, later = {}, []
    for line in source:
        if first.setdefault(line["number"], line) is not line:
            later.append((int(line["number"]), line["minutes"], line["date"]))
    given = [(int(line["number"]), line["date"], line["minutes"], line["who"] or "") for line in first.values()]
    assert [(row.number, row.date, row.minutes, row.who) for row in history()] == given
    assert [(AGAIN, *timing) for timing in timed_again()] == later


# ---- What points to it -----------------------------------------------------------------------------------------------


def test_numbers_in_the_scripts_comments_docstrings_and_help_are_records():
    script = (ROOT / "train_gpt.py").read_text(encoding="utf-8")
    tokens = tokenize.generate_tokens(io.StringIO(script).readline)
    texts = [token.string for token in tokens if token.type == tokenize.COMMENT]
    nodes = ast.walk(ast.parse(script))
    texts += [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    named = as_numbers([numbers for text in texts for numbers in NUMBERS.findall(text)])
    assert len(named) > 20  # the pattern still finds them
    assert named <= {row.number for row in history()}


def test_numbers_in_the_readme_are_records():
    techniques = README.partition("\n## The techniques\n")[2].partition("\n## ")[0]
    column = re.findall(r"^\|[^|]+\| [^|]*`--[^|]+\| ([\d, ]+) \|", techniques, re.MULTILINE)
    in_brackets = NUMBERS.findall(techniques)
    assert len(column) > 10 and len(in_brackets) > 5
    assert as_numbers(column + in_brackets) <= {row.number for row in history()}


def test_the_readme_points_to_it():
    for heading in "The techniques", "Thanks":
        text = README.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
        assert "](records/README.md#the-public-history)" in text, heading
