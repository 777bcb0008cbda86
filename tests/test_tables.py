"""The tables of train_gpt.py are edited by hand: a row that cannot work is refused in one line that names it."""

import re
from pathlib import Path

import pytest

from test_command_line import SCRIPT, assert_line, launcher  # noqa: F401

GOOD_LAYERS = ["Layer(value_embeds=0)", "Layer(window='long', xsa=True)", "Layer(skip=0, single_input=1)"]
GOOD_STAGES = [
    "Stage(2, 1024, 64, windows=(16, 32), lr=1.0, mtp=((1, 0.5), (1, 0)), tied=True)",
    "Stage(2, 1024, 64, windows=(16, 32), lr=1.0, mtp=((1, 0), (1, 0)))",
]


@pytest.fixture
def plan(launcher, tmp_path):  # noqa: F811
    """Runs --dry-run of a copy of train_gpt.py whose preset tiny has these tables."""

    def run(layers=GOOD_LAYERS, stages=GOOD_STAGES, options=()):
        text = SCRIPT.read_text()
        for name, rows in (("MINI_LAYERS", layers), ("MINI_STAGES", stages)):
            table = name + " = (\n" + "".join(f"    {row},\n" for row in rows) + ")\n"
            text, count = re.subn(rf"^{name} = \(\n.*?^\)\n", lambda _, new=table: new, text, flags=re.S | re.M)
            assert count == 1
        script = tmp_path / "train_gpt.py"
        script.write_text(text)
        return launcher.start(script, "--preset", "mini", "--dry-run", *options, cwd=tmp_path).wait()

    return run


def test_tables_that_can_work_are_printed_row_by_row(plan):
    done = plan()
    assert done.returncode == 0, done.stderr
    header, *rows = done.stdout.split("\n\n")[1].splitlines()
    columns = header.split()
    table = [dict(zip(columns, row.split(), strict=True)) for row in rows]
    assert [row["layer"] for row in table] == ["0", "1", "2"]
    assert [row["window"] for row in table] == ["short", "long", "short"]
    assert [row["value_embeds"] for row in table] == ["0", "-", "-"]
    assert [row["xsa"] for row in table] == ["-", "yes", "-"]
    assert [(row["skip"], row["single_input"]) for row in table] == [("-", "-"), ("-", "-"), ("0", "1")]


MUDD = "Layer(mudd=(0, 1, 1))"

# A layer to put in place of a good one, its number, and what the line names: the row, the column, what is allowed.
LAYERS = [
    (0, "Layer(skip=0)", "layer 0: skip=0", "earlier layer"),
    (2, "Layer(skip=2)", "layer 2: skip=2", "from 0 to 1"),
    (2, "Layer(skip=-1)", "layer 2: skip=-1", "from 0 to 1"),
    (2, "Layer(skip='1')", "layer 2: skip='1'", "from 0 to 1"),
    (2, "Layer(skip=True)", "layer 2: skip=True", "from 0 to 1"),
    (1, "Layer(single_input=1)", "layer 1: single_input=1", "from 0 to 0"),
    (1, "Layer(single_input=7)", "layer 1: single_input=7", "from 0 to 0"),
    (2, "Layer(mudd=(0, 1, 2))", "layer 2: mudd=(0, 1, 2)", "from 0 to 1"),
    (2, "Layer(mudd=(0, 1))", "layer 2: mudd=(0, 1)", "three"),
    (2, "Layer(mudd=(0, 1, 1, 1))", "layer 2: mudd=(0, 1, 1, 1)", "three"),
    (2, "Layer(mudd=1)", "layer 2: mudd=1", "three"),
    (2, f"{MUDD}, {MUDD}", "layer 3: mudd=(0, 1, 1)", "layer 2"),
    (1, "Layer(window='medium')", "layer 1: window='medium'", '"short" or "long"'),
    (1, "Layer(window=128)", "layer 1: window=128", '"short" or "long"'),
    (2, "Layer(value_embeds=2)", "layer 2: value_embeds=2", "no layer has 1"),
    (2, "Layer(value_embeds=-1)", "layer 2: value_embeds=-1", "from 0 on"),
    (2, "Layer(value_embeds=True)", "layer 2: value_embeds=True", "from 0 on"),
    (2, "Layer(value_embeds=[0])", "layer 2: value_embeds=[0]", "from 0 on"),
    (1, "Layer(xsa=1)", "layer 1: xsa=1", "True or False"),
    (1, "Layer(attention=False, xsa=True)", "layer 1: xsa=True", "attention"),
    (1, "Layer(attention=False, paired_heads=True)", "layer 1: paired_heads=True", "attention"),
    (1, "Layer(attention=False, value_embeds=1)", "layer 1: value_embeds=1", "attention"),
    (1, "Layer(attention=False, single_input=0)", "layer 1: single_input=0", "attention"),
    (1, "Layer(attention=False, window='long')", "layer 1: window='long'", "attention"),
    (2, "Layer(attention=False, mudd=(0, 1, 1))", "layer 2: mudd=(0, 1, 1)", "attention"),
    (1, "Layer(gates=True)", "layer 1: gates=True", "layer 0"),
    (1, "Layer(dc=True)", "layer 1: dc=True", "layer 0"),
    (0, "Layer(gates=True, dc=True, paired_heads=True)", "layer 0: dc=True", "paired"),
    (0, "Layer(attention=False, gates=True, dc=True)", "layer 0: dc=True", "attention"),
]


@pytest.mark.parametrize(("number", "row", "cell", "allowed"), LAYERS, ids=[row for _, row, *_ in LAYERS])
def test_layer_that_cannot_work_is_refused_with_row_column_and_what_is_allowed(plan, number, row, cell, allowed):
    layers = [*GOOD_LAYERS[:number], row, *GOOD_LAYERS[number + 1 :]]
    assert_line(plan(layers=layers), cell, allowed)


def test_network_without_attention_is_refused(plan):
    assert_line(plan(layers=["Layer(attention=False)"]), "at least one layer must have attention")


def test_odd_numbers_of_heads_are_refused_only_where_a_row_needs_pairs_or_halves(plan):
    options = ("--heads", "3", "--dim", "48", "--bigram-dim", "16", "--head-pairs", "false")
    assert plan(options=options).returncode == 0
    for row in "Layer(paired_heads=True)", MUDD:
        assert_line(plan(layers=[*GOOD_LAYERS, row], options=options), "--heads 3 must be even")


def stage(**changes):
    columns = {"steps": 2, "batch_tokens": 1024, "max_seq_len": 64, "windows": (16, 32), "lr": 1.0}
    columns |= {"mtp": ((1, 0), (1, 0))} | changes
    return f"Stage({', '.join(f'{name}={value}' for name, value in columns.items())})"


STAGES = [
    (1, {"steps": 0}, "stage 2: steps=0", "at least 1"),
    (0, {"batch_tokens": 0}, "stage 1: batch_tokens=0", "at least 1"),
    (0, {"batch_tokens": 1024.0}, "stage 1: batch_tokens=1024.0", "whole number"),
    (1, {"max_seq_len": 0}, "stage 2: max_seq_len=0", "at least 1"),
    (1, {"windows": (0, 32)}, "stage 2: windows=(0, 32)", "at least 1"),
    (1, {"windows": (16,)}, "stage 2: windows=(16,)", "two"),
    (1, {"windows": 16}, "stage 2: windows=16", "two"),
    (1, {"lr": 0}, "stage 2: lr=0", "above 0"),
    (1, {"mtp": ((1, 0), (1,))}, "stage 2: mtp=((1, 0), (1,))", "as many"),
    (1, {"mtp": ((1,), (1,))}, "stage 2: mtp=((1,), (1,))", "2 weights"),
    (1, {"mtp": ((0, 1), (1, 0))}, "stage 2: mtp=((0, 1), (1, 0))", "above 0"),
    (1, {"mtp": ((), ())}, "stage 2: mtp=((), ())", "as many"),
    (1, {"mtp": ((1, "'a'"), (1, 0))}, "stage 2: mtp=", "two tuples of weights"),
    (1, {"prefix": 0.25}, "stage 2: prefix=0.25", "two weights"),
    (1, {"prefix": (0.25,)}, "stage 2: prefix=(0.25,)", "two weights"),
    (1, {"prefix": (0.25, "'a'")}, "stage 2: prefix=", "two weights"),
    (0, {"prefix": (0.25, -1)}, "stage 1: prefix=(0.25, -1)", "at least 0"),
    (1, {"tied": 1}, "stage 2: tied=1", "True or False"),
    (1, {"mtp": (1, 0)}, "stage 2: mtp=(1, 0)", "weights"),
]


@pytest.mark.parametrize(("number", "changes", "cell", "allowed"), STAGES)
def test_stage_that_cannot_work_is_refused_with_row_column_and_what_is_allowed(plan, number, changes, cell, allowed):
    stages = [*GOOD_STAGES[:number], stage(**changes), *GOOD_STAGES[number + 1 :]]
    assert_line(plan(stages=stages), cell, allowed)


def test_stage_that_ties_again_what_an_earlier_one_has_untied_is_refused(plan):
    stages = [stage(tied=True), stage(), stage(tied=True)]
    assert_line(plan(stages=stages), "stage 3: tied=True", "earlier stage")


def test_no_line_of_the_script_is_over_100_columns_wide():
    wide = [number for number, line in enumerate(Path(SCRIPT).read_text().splitlines(), 1) if len(line) > 100]
    assert not wide
