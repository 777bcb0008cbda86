"""The schedule of the record, worked out by hand from the recipe's table, and how --steps shrinks it."""

import itertools
import re
from dataclasses import replace

import pytest

import recipe
from recipe import RECORD
from train_gpt import UserError, schedule, with_steps


@pytest.mark.parametrize(
    ("step", "lr"),
    [
        (0, 1.0),
        (299, 1.0),
        (422, 1.0),
        (423, 1.52),  # stage 2
        (508, 1.52),  # the last step at full rate: the cooldown takes the other 762
        (509, 1.52 * 761 / 762 + 0.15 / 762),
        (846, 1.52 * 424 / 762 + 0.15 * 338 / 762),
        (847, 1.73 * 423 / 762 + 0.15 * 339 / 762),  # stage 3
        (1269, 1.73 * 1 / 762 + 0.15 * 761 / 762),
        (1270, 0.15),  # the extension
        (1284, 0.15),
    ],
)
def test_the_learning_rate_is_constant_for_two_fifths_and_then_falls_to_015(step, lr):
    assert schedule(RECORD, step).lr == pytest.approx(lr, rel=1e-9)


def test_the_learning_rate_jumps_from_0912_to_1027_at_step_847():
    assert schedule(RECORD, 846).lr == pytest.approx(0.912, abs=5e-4)
    assert schedule(RECORD, 847).lr == pytest.approx(1.027, abs=5e-4)


def test_the_cooldowns_length_and_its_end_are_options():
    settings = replace(RECORD, cooldown=0.8, final_lr=0.2)
    rates = [schedule(settings, step).lr for step in (254, 255, 1269, 1270, 1284)]
    # It begins after 0.2 x 1,270 steps, and takes the other 1,016.
    assert rates == pytest.approx([1, (1015 + 0.2) / 1016, (1.73 + 0.2 * 1015) / 1016, 0.2, 0.2], rel=1e-9)


@pytest.mark.parametrize(
    ("step", "momentum"),
    [(0, 0.85), (150, 0.9), (299, 0.949667), (300, 0.95), (847, 0.95), (1235, 0.95), (1274, 0.872), (1284, 0.852)],
)
def test_the_momentum_rises_over_300_steps_and_falls_over_the_last_50(step, momentum):
    assert schedule(RECORD, step).momentum == pytest.approx(momentum, abs=1e-6)


@pytest.mark.parametrize(
    ("first", "last", "batch_tokens", "max_seq_len", "windows", "tied"),
    [
        (0, 422, 131_072, 896, (128, 384), True),
        (423, 846, 262_144, 2048, (384, 896), True),
        (847, 1269, 393_216, 2048, (640, 1408), False),
        (1270, 1284, 393_216, 2048, (768, 1664), False),
    ],
)
def test_the_stages_begin_and_end_where_the_recipe_says(first, last, batch_tokens, max_seq_len, windows, tied):
    for step in (first, last):
        stage = schedule(RECORD, step).stage
        assert (stage.batch_tokens, stage.max_seq_len) == (batch_tokens, max_seq_len)
        assert (stage.windows, stage.tied) == (windows, tied)


def test_the_final_validation_has_windows_of_its_own():
    assert schedule(RECORD, 1285).stage.windows == (768, 2560)


def test_adam_runs_on_odd_steps():
    assert [step for step in range(9) if schedule(RECORD, step).adam] == [1, 3, 5, 7]


@pytest.mark.parametrize(("every", "steps"), [(1, [0, 1, 2, 3, 4, 5, 6, 7, 8]), (3, [2, 5, 8]), (9, [8]), (10, [])])
def test_adam_can_run_more_often_or_less(every, steps):
    settings = replace(RECORD, adam_every=every)
    assert [step for step in range(9) if schedule(settings, step).adam] == steps


def test_embedding_tables_can_have_every_second_of_adams_updates_from_a_step_on():
    settings = replace(RECORD, tables_every=2, tables_from=336)
    hypers = {step: schedule(settings, step) for step in (*range(330, 345), *range(918, 929))}
    assert [step for step, hyper in hypers.items() if hyper.adam] == [*range(331, 345, 2), *range(919, 929, 2)]
    both = [step for step, hyper in hypers.items() if hyper.adam and hyper.tables]
    assert both == [331, 333, 335, 339, 343, 919, 923, 927]
    assert all(schedule(RECORD, step).tables for step in range(1285))


def test_the_fp8_scale_of_w_out_is_a_step_late_but_for_the_first_16_steps():
    assert [step for step in range(20) if schedule(RECORD, step).delayed] == [16, 17, 18, 19]


@pytest.mark.recipe
def test_dry_run_prints_the_totals_of_the_recipe(train_gpt, tmp_path):
    plan = train_gpt("--preset", "record", "--dry-run")
    assert plan.returncode == 0, plan.stderr
    # 423 x 131,072 + 424 x 262,144 + 438 x 393,216 tokens; 38.6M in the head, 51.9M in MLPs, 23.6M in attention
    assert re.search(r"training tokens: 338\.8M\b", plan.stdout)
    assert re.search(r"active matrix parameters: 114\.1M\b.*38\.6M.*51\.9M.*23\.6M", plan.stdout)
    assert "1,285 steps" in plan.stdout
    assert list(tmp_path.iterdir()) == []


# ----------------------------------------------------------------------------------------------------------------------
# --steps
# ----------------------------------------------------------------------------------------------------------------------


def lengths(settings):
    return [stage.steps for stage in settings.all_stages]


def test_200_steps_share_out_like_1285():
    short = with_steps(RECORD, 200)
    assert lengths(short) == [66, 66, 66, 2]  # the stages end at 65.8, 131.8, 197.7 and 200
    assert (short.momentum_warmup, short.momentum_cooldown) == (47, 8)  # of 46.7 and 7.8


def test_what_counts_steps_shrinks_with_them_and_what_is_off_stays_off():
    short = with_steps(replace(RECORD, average_steps=300, tables_from=336), 200)
    assert short.average_steps == 47  # of 46.7; one step is left of what is on at all
    assert short.tables_from == 52  # of 52.3
    assert with_steps(replace(RECORD, average_steps=1), 200).average_steps == 1
    assert with_steps(RECORD, 200).average_steps == 0


def test_the_last_steps_are_counted_for_the_mean_of_their_weights():
    settings = replace(RECORD, average_steps=300)
    counts = [schedule(settings, step).averaged for step in (0, 984, 985, 986, 1284)]
    assert counts == [0, 0, 1, 2, 300]
    assert {schedule(RECORD, step).averaged for step in range(1285)} == {0}


def test_four_steps_are_one_step_a_stage():
    short = with_steps(RECORD, 4)
    assert lengths(short) == [1, 1, 1, 1]
    windows = [schedule(short, step).stage.windows for step in range(4)]
    assert windows == [(128, 384), (384, 896), (640, 1408), (768, 1664)]
    assert schedule(short, 3).lr == pytest.approx(0.15)


def test_fewer_steps_than_stages_are_refused():
    with pytest.raises(UserError, match="--steps 3"):
        with_steps(RECORD, 3)


@pytest.mark.parametrize("preset", recipe.PRESETS)
def test_any_number_of_steps_is_met_exactly_and_leaves_no_stage_empty(preset):
    full = recipe.PRESETS[preset]
    ends = list(itertools.accumulate(lengths(full)))
    for steps in (*range(4, 120), 200, 489, 1000, 1285, 1286, 5000):
        short = with_steps(full, steps)
        assert short.total_steps == steps
        assert min(lengths(short)) >= 1
        assert min(short.momentum_warmup, short.momentum_cooldown) >= 1
        # A stage ends within half a step of its share, or a step early, to leave a step to each that follows.
        for end, whole in zip(itertools.accumulate(lengths(short)), ends, strict=True):
            assert -1 < end - whole * steps / full.total_steps <= 0.5
        assert schedule(short, steps - 1).lr == pytest.approx(full.final_lr)


def test_as_many_steps_as_the_preset_has_change_nothing():
    same = with_steps(RECORD, 1285)
    assert (same.stages, same.extension) == (RECORD.stages, RECORD.extension)
    assert (same.momentum_warmup, same.momentum_cooldown) == (300, 50)
