"""--wandb mirrors the log's numbers, here offline; without the package it says so in a line."""

import re

import pytest

from test_command_line import command, data, launcher, log_lines, small  # noqa: F401 (fixtures)


def test_wandb_gets_every_number_of_the_log(small, tmp_path):  # noqa: F811
    pytest.importorskip("wandb")
    environment = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}
    result = small("--steps", "4", "--wandb", "speedrun", "--run-id", "mirrored", **environment)
    assert result.returncode == 0, result.stderr
    (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    # Its records are Protocol Buffers with the numbers as text; a number of 1 byte's length follows its name and tag.
    seen = re.findall(rb"(train_loss|val_loss)[\x00-\x1f\x80-\xff]{1,3}?.([0-9.]+)", path.read_bytes())
    steps = [re.match(r"step:(\d+)/4 (\w+):(\S+)", line) for line in log_lines(tmp_path)]
    logged = [(step[2], float(step[3])) for step in steps if step]
    assert {(key.decode(), round(float(loss), 4)) for key, loss in seen} >= set(logged)
    assert len(logged) == 6


def test_wandb_without_the_package_is_answered_with_a_line(small, tmp_path):  # noqa: F811
    before = "sys.modules['wandb'] = None\n"
    line = small("--steps", "4", "--wandb", "speedrun", before=before)
    assert line.returncode == 2 and "pip install wandb" in line.stderr and line.stderr.count("\n") == 1
