"""records/logbook.py, used as its users do: from the command line, on logs of all ages and on files that are none."""

import hashlib
import json
import os
import random
import re
import shlex
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import log_reader
import plots

ROOT = Path(__file__).resolve().parent.parent
LOGBOOK = ROOT / "records" / "logbook.py"
PUBLIC_LOGS = ROOT.parent / "shared" / "logs"
SIGN_TRICK = PUBLIC_LOGS / "2026-05_sign_trick"
RULE = "=" * 100

needs_public_logs = pytest.mark.skipif(not PUBLIC_LOGS.is_dir(), reason="the public logs are not here")


def logbook(*args, status=0, script=LOGBOOK, env=None):
    """Runs a command and returns what it prints; its exit status must be `status`."""
    command = [sys.executable, str(script), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", env=env)
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode == status, (done.returncode, done.stdout, done.stderr)
    return done


def mistake(*args, **kwargs):
    """The one line on stderr that a mistake gets."""
    lines = logbook(*args, status=2, **kwargs).stderr.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def show(*paths, status=0):
    return json.loads(logbook("show", "--json", *paths, status=status).stdout)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def val(step, total, loss, ms, average=50.0):
    return f"step:{step}/{total} val_loss:{loss} train_time:{ms}ms step_avg:{average}ms\n"


def train(step, total, loss, ms, average=50.0):
    return f"step:{step}/{total} train_loss:{loss} train_time:{ms}ms step_avg:{average}ms\n"


def header(source, hardware="AMD EPYC, 2 cores", commit=f"{'0123456789' * 4} dirty", settings=None):
    """What train_gpt.py writes between its source and the first training line."""
    return (
        ("" if source.endswith(b"\n") else "\n")
        + f"{RULE}\nsource: {len(source)} bytes, sha256 {hashlib.sha256(source).hexdigest()}\n"
        + f"python: 3.12.3\npytorch: 2.13.0+cpu\ncuda: none\ntriton: none\nhardware: {hardware}\nworld size: 1\n"
        + f"git: {commit}\nsettings: {json.dumps(settings or {'preset': 'tiny', 'seed': 1})}\n"
        + "data: train data/sympy/sympy_train_000001.bin 24,123,456 tokens\n"
        + f"data: val data/sympy/sympy_val_000000.bin 1,234,567 tokens\n{RULE}\n"
    ).encode()


def our_log(source=b"print('hello')\n", lines=None, **kwargs):
    """A whole log of train_gpt.py."""
    lines = lines or val(0, 100, 5.5512, 0, 0.0) + train(99, 100, 2.2, 4950) + val(100, 100, 2.1034, 5001, 50.01)
    return source + header(source, **kwargs) + lines.encode() + b"peak memory allocated: 812 MiB reserved: 900 MiB\n"


def finished(path, loss, ms=80_000, total=1000):
    """A log of one finished run."""
    return write(path, val(0, total, 10.8, 0) + val(total // 2, total, 4.5, ms // 2) + val(total, total, loss, ms))


def sample(folder, losses, times=None):
    times = times or [80_000 + 10 * i for i in range(len(losses))]
    runs = zip(losses, times, strict=True)
    return [finished(folder / f"{i:02}.txt", loss, ms) for i, (loss, ms) in enumerate(runs)]


# ----------------------------------------------------------------------------------------------------------------------
# Public logs; all numbers below are typed in from the files' last lines
# ----------------------------------------------------------------------------------------------------------------------

PUBLIC = {
    "2024-05_llmc_baseline.log": (19560, None, 3.2722, None, None, None),
    "2024-06_adamw.log": (9536, None, 3.275959, None, None, None),
    "2024-10_muon.txt": (6200, 6200, 3.2785, 1339067, 216.33, None),
    "2024-11_unet.txt": (3000, 3000, 3.2753, 433570, 145.01, None),
    "2025-01_softcap.txt": (1390, 1390, 3.2785, 204345, 148.08, 31563),
    "2025-09_fa3.txt": (1670, 1670, 3.2755, 163621, 97.98, 34217),
    "2026-05_sign_trick/0cf91274.txt": (1480, 1480, 3.2763, 84237, 56.92, 30868),
    "2026-05_sign_trick/14564bfb.txt": (1480, 1480, 3.2806, 84392, 57.02, 30879),
    "2026-05_sign_trick/1dd117ff.txt": (1480, 1480, 3.2789, 84485, 57.08, 30879),
    "2026-05_sign_trick/312a1b62.txt": (1480, 1480, 3.2785, 84464, 57.07, 30164),
    "2026-05_sign_trick/4c974e08.txt": (1480, 1480, 3.2780, 84403, 57.03, 30879),
    "2026-05_sign_trick/4d91d32b.txt": (1480, 1480, 3.2790, 84441, 57.05, 30879),
    "2026-05_sign_trick/683ecc54.txt": (1480, 1480, 3.2794, 84582, 57.15, 30868),
    "2026-05_sign_trick/70b757a2.txt": (1480, 1480, 3.2798, 84404, 57.03, 30879),
    "2026-05_sign_trick/805f13d9.txt": (1480, 1480, 3.2788, 84457, 57.07, 30879),
    "2026-05_sign_trick/8bfe67e4.txt": (1480, 1480, 3.2802, 84443, 57.06, 30868),
    "2026-05_sign_trick/8f918574.txt": (1480, 1480, 3.2798, 84454, 57.06, 30879),
    "2026-05_sign_trick/a29bd64e.txt": (1480, 1480, 3.2783, 84468, 57.07, 30868),
    "2026-05_sign_trick/a2a8f5e6.txt": (1480, 1480, 3.2789, 84450, 57.06, 30868),
    "2026-05_sign_trick/ad4c55f8.txt": (1480, 1480, 3.2775, 84357, 57.00, 30879),
    "2026-05_sign_trick/b3ca82bb.txt": (1480, 1480, 3.2811, 84381, 57.01, 30879),
    "2026-05_sign_trick/cb6c043a.txt": (1480, 1480, 3.2793, 84424, 57.04, 30868),
    "2026-05_sign_trick/cc21ff70.txt": (1480, 1480, 3.2802, 84330, 56.98, 30879),
    "2026-05_sign_trick/e1054fd6.txt": (1480, 1480, 3.2785, 84514, 57.10, 30879),
    "2026-05_sign_trick/ed23ce5d.txt": (1480, 1480, 3.2801, 84471, 57.08, 30879),
    "2026-05_sign_trick/f428d9a9.txt": (1480, 1480, 3.2803, 84433, 57.05, 30868),
}


@needs_public_logs
def test_show_gives_what_the_last_lines_of_public_logs_say():
    rows = show(*(PUBLIC_LOGS / name for name in PUBLIC))
    keys = ["file", "final_step", "total_steps", "val_loss", "train_time_ms", "step_avg_ms", "peak_memory_mib"]
    expected = [dict(zip(keys, (str(PUBLIC_LOGS / name), *row), strict=True)) for name, row in PUBLIC.items()]
    assert rows == expected
    assert sorted(PUBLIC) == sorted(
        str(path.relative_to(PUBLIC_LOGS)) for path in PUBLIC_LOGS.rglob("*.*") if path.is_file()
    )


@needs_public_logs
def test_stats_of_the_sign_trick_are_what_its_authors_published():
    out = logbook("stats", *sorted(SIGN_TRICK.glob("*.txt"))).stdout
    assert "n = 20\n" in out
    assert "mean 3.27917, standard deviation 0.00115" in out
    assert "p = 0.0024 " in out
    assert "84,429.5 ms ± 71.6" in out
    assert out.splitlines()[-1] == "significant (p < 0.01)"


@needs_public_logs
def test_a_picture_of_public_logs_names_axes_units_target_and_groups(tmp_path):
    picture = tmp_path / "runs.svg"
    others = [PUBLIC_LOGS / "2025-09_fa3.txt", PUBLIC_LOGS / "2024-06_adamw.log"]
    logbook("plot", *SIGN_TRICK.glob("*.txt"), *others, "--out", picture)
    text = re.sub(r"<!--.*?-->", "", picture.read_text(encoding="utf-8"))
    for words in (
        ">Training steps<",
        ">Training time (s)<",
        ">Validation loss (nats per token)<",
        ">target 3.28<",
        ">2026-05_sign_trick (20 runs)<",
        ">2025-09_fa3<",
        ">2024-06_adamw<",
    ):
        assert words in text, words


# ----------------------------------------------------------------------------------------------------------------------
# What a log may look like
# ----------------------------------------------------------------------------------------------------------------------


def test_show_reads_a_log_of_ours(tmp_path):
    path = write(tmp_path / "a.txt", our_log())
    assert show(path) == [
        {
            "file": str(path),
            "final_step": 100,
            "total_steps": 100,
            "val_loss": 2.1034,
            "train_time_ms": 5001,
            "step_avg_ms": 50.01,
            "peak_memory_mib": 812,
        }
    ]
    row = logbook("show", path).stdout.splitlines()[1]
    assert re.split(r"  +", row) == [
        str(path), "100/100", "2.1034", "5,001 ms", "50.01 ms", "812 MiB", "AMD EPYC, 2 cores", "01234567 dirty",
    ]  # fmt: skip


def test_markdown_is_a_table(tmp_path):
    lines = logbook("show", "--markdown", write(tmp_path / "a|b.txt", our_log())).stdout.splitlines()
    assert lines[0].startswith("| log | steps | loss |")
    assert re.fullmatch(r"\|( -+:? \|)+", lines[1])
    assert r"a\|b.txt | 100/100 | 2.1034 |" in lines[2]


FAKE_LINES = (
    "step:250/1390 val_loss:1.0000 train_time:1ms step_avg:1.00ms\n"
    "step:{step}/{total} val_loss:{val_loss:.4f} train_time:{ms:.0f}ms\n"
    "s:5 tel:1.0\nhardware: a toaster\ngit: deadbeef\npeak memory allocated: 1 MiB\n"
    "step:1390/1390 val_loss:oops train_time:1ms step_avg:1.00ms\n"
)


def test_lines_in_the_source_that_look_like_a_logs_are_not_read(tmp_path):
    fake_end = f"{RULE}\nsource: 12 bytes, sha256 {'0' * 64}\n"
    source = f'"""\n{FAKE_LINES}{fake_end}{FAKE_LINES}{RULE}\n{FAKE_LINES}"""\nprint(1)\n'.encode()
    done = logbook("show", write(tmp_path / "a.txt", our_log(source)))
    assert len(done.stdout.splitlines()) == 2 and "AMD EPYC" in done.stdout and "2.1034" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize("quoted", [0, 5, None], ids=["nothing", "five bytes", "all before it"])
def test_a_source_may_quote_the_true_end_of_a_shorter_source(tmp_path, quoted):
    before = b'"""\nabcd\n'
    inner = before if quoted is None else before[len(before) - quoted :]
    source = before + header(inner) + FAKE_LINES.encode() + b'"""\nprint(2)\n'
    log = write(tmp_path / "a.txt", our_log(source))
    assert [row["val_loss"] for row in show(log)] == [2.1034]
    logbook("extract", log, "--out", tmp_path / "train.py")
    assert (tmp_path / "train.py").read_bytes() == source


def test_training_lines_before_the_first_rule_of_a_public_log_are_source(tmp_path):
    text = f"import torch\n{FAKE_LINES}{RULE}\nRunning Python 3.12.7\n{RULE}\n{val(100, 100, 3.1, 5000)}"
    done = logbook("show", "--json", write(tmp_path / "a.txt", text))
    assert [row["val_loss"] for row in json.loads(done.stdout)] == [3.1]
    assert "taken for source text" in done.stderr


def test_cards_of_a_public_log_come_from_its_nvidia_smi_table(tmp_path):
    cards = "".join(
        f"|   {i}  NVIDIA H100 80GB HBM3          On  | 00000000:{i}1:00.0 Off |                    0 |\n"
        f"| N/A   34C    P0            116W /  700W |       3MiB /  81559MiB |      0%      Default |\n"
        for i in range(8)
    )
    text = f"import torch\n{RULE}\nRunning Python 3.12.7\n{cards}{RULE}\n{val(100, 100, 3.1, 5000)}"
    assert "8 x NVIDIA H100 80GB HBM3" in logbook("show", write(tmp_path / "a.txt", text)).stdout


def test_windows_line_ends_are_line_ends(tmp_path):
    source = b"import sys\n\nprint(sys.version)\n"
    log = write(tmp_path / "a.txt", our_log(source).replace(b"\n", b"\r\n"))
    done = logbook("show", "--json", log)
    (row,) = json.loads(done.stdout)
    assert (row["final_step"], row["val_loss"], row["peak_memory_mib"], done.stderr) == (100, 2.1034, 812, "")
    logbook("extract", log, "--out", tmp_path / "train.py")
    assert (tmp_path / "train.py").read_bytes() == source


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path):
    assert show(write(tmp_path / "a.txt", b"\xef\xbb\xbf" + val(5, 5, 3.5, 10).encode()))[0]["val_loss"] == 3.5


@pytest.mark.parametrize(
    ("fields", "ms", "average"),
    [
        ("train_time:85.2s step_avg:0.0163s", 85200, 16.3),
        ("train_time:16.1s", 16100, None),
        ("train_time:85.2 s step_avg:57 ms", 85200, 57),
        ("train_time:285ms step_avg:nanms", 285, None),
        ("train_time:285 ms step_avg:nan ms", 285, None),
        ("lr:0.5 train_time:0ms tok/s:5 step_avg:0.03ms norm:2.1", 0, 0.03),
        ("", None, None),
    ],
)
def test_times_may_be_seconds_or_not_a_number_or_missing(tmp_path, fields, ms, average):
    (row,) = show(write(tmp_path / "a.txt", f"step:7/7 val_loss:3.5 {fields}\n"))
    assert (row["val_loss"], row["train_time_ms"], row["step_avg_ms"]) == (3.5, ms, average)


@pytest.mark.parametrize(
    ("line", "mib"),
    [
        ("peak memory consumption: 31563 MiB", 31563),
        ("peak memory allocated: 30868 MiB reserved: 45200 MiB", 30868),
        ("peak memory: 2.5 GiB", 2560),
    ],
)
def test_peak_memory_is_read_in_its_spellings(tmp_path, line, mib):
    assert show(write(tmp_path / "a.txt", val(5, 5, 3.5, 10) + line + "\n"))[0]["peak_memory_mib"] == mib


def test_runs_in_one_file_are_a_row_each(tmp_path):
    first = val(0, 100, 10.8, 0) + train(90, 100, 3.0, 4000) + val(100, 100, 3.31, 5000)
    second = val(0, 100, 10.8, 0) + train(40, 100, 4.0, 2000)  # killed
    third = val(0, 200, 10.8, 0) + val(200, 200, 3.29, 9000) + "peak memory allocated: 7 MiB reserved: 9 MiB\n"
    path = write(tmp_path / "a.txt", first + second + third)
    rows = [(row["final_step"], row["total_steps"], row["val_loss"], row["train_time_ms"]) for row in show(path)]
    assert rows == [(100, 100, 3.31, 5000), (40, 100, 10.8, 2000), (200, 200, 3.29, 9000)]
    assert [row["peak_memory_mib"] for row in show(path)] == [None, None, 7]
    assert "a.txt run 2 " in logbook("show", path).stdout


def test_logs_put_together_are_runs_of_their_own(tmp_path):
    stopped = our_log(b"a = 1\n" + FAKE_LINES.encode(), val(0, 100, 5.5, 0) + val(50, 100, 3.5, 2500))
    resumed = our_log(b"b = 2\n" + FAKE_LINES.encode(), val(100, 100, 2.5, 5000), hardware="2 x NVIDIA B200")
    path = write(tmp_path / "a.txt", stopped + resumed)
    assert [(row["final_step"], row["val_loss"]) for row in show(path)] == [(50, 3.5), (100, 2.5)]
    rows = logbook("show", path).stdout.splitlines()
    assert "AMD EPYC" in rows[1] and "2 x NVIDIA B200" in rows[2]
    assert "several scripts" in mistake("extract", path, "--out", tmp_path / "train.py")


def test_a_training_loss_that_comes_late_does_not_begin_another_run(tmp_path):
    lines = train(240, 500, 4.1, 12_000) + val(250, 500, 4.0, 12_500) + train(248, 500, 4.1, 12_400)
    lines += train(496, 500, 3.3, 24_800) + val(500, 500, 3.2, 25_000) + train(498, 500, 3.3, 24_900)
    (row,) = show(write(tmp_path / "a.txt", lines))
    assert (row["final_step"], row["val_loss"], row["train_time_ms"]) == (500, 3.2, 25_000)


def test_a_killed_run_shows_its_last_step_and_its_last_validation(tmp_path):
    path = write(tmp_path / "a.txt", val(250, 1000, 4.2, 12_500) + train(251, 1000, 4.1, 12_550) + "stopped: SIGTERM\n")
    (row,) = show(path)
    assert (row["final_step"], row["val_loss"], row["train_time_ms"]) == (251, 4.2, 12_550)
    assert "4.2000 at 250" in logbook("show", path).stdout


def test_a_number_that_the_end_of_the_file_may_have_cut_is_not_read(tmp_path):
    done = logbook("show", "--json", write(tmp_path / "a.txt", "s:128 tel:6.034447\ns:256 tel:5.2"))
    assert [row["val_loss"] for row in json.loads(done.stdout)] == [6.034447]
    assert "may be cut short" in done.stderr
    whole = write(tmp_path / "b.txt", val(5, 5, 3.5, 10).rstrip())
    assert logbook("show", whole).stderr == ""


def test_a_line_that_cannot_be_read_is_named_and_the_rest_is_read(tmp_path):
    lines = "hello\n" + val(250, 500, "4.0x", 12_500) + val(500, 500, 3.2, 25_000)
    bad, good = write(tmp_path / "bad.txt", lines), write(tmp_path / "good.txt", our_log())
    done = logbook("show", "--json", bad, good, status=2)
    assert [row["val_loss"] for row in json.loads(done.stdout)] == [3.2, 2.1034]
    assert done.stderr == f"logbook.py: {bad}: line 2: cannot read 'val_loss:4.0x'\n"


@pytest.mark.parametrize("fields", ["val_loss:3.5 train_time:85", "val_loss:3.5ms", "val_loss:", "val_loss:3,5"])
def test_a_number_without_its_unit_or_with_another_is_not_guessed(tmp_path, fields):
    assert "line 1: cannot read" in logbook(
        "show", write(tmp_path / "a.txt", f"step:7/7 {fields}\n"), status=2
    ).stderr  # fmt: skip


def test_files_without_a_run_are_named_with_the_reason_and_the_rest_is_read(tmp_path):
    files = {
        "none.txt": "nothing of interest\n",
        "crashed.txt": b"print(1)\n" + header(b"print(1)\n"),
        "empty.txt": "",
        "wide.txt": val(5, 5, 3.5, 10).encode("utf-16"),
    }
    good = write(tmp_path / "good.txt", our_log())
    paths = [write(tmp_path / name, text) for name, text in files.items()]
    done = logbook("show", "--json", *paths, tmp_path / "missing.txt", tmp_path, good, status=2)
    assert [row["file"] for row in json.loads(done.stdout)] == [str(good)]
    reasons = ["no training lines", "no training lines", "is empty", "is UTF-16 text; convert it to UTF-8"]
    reasons = [f"logbook.py: {path}: {reason}" for path, reason in zip(paths, reasons, strict=True)]
    reasons += [
        f"logbook.py: {tmp_path / 'missing.txt'}: No such file or directory",
        f"logbook.py: {tmp_path}: is not a file",
    ]
    assert done.stderr.splitlines() == reasons


def test_a_loss_that_is_not_a_number_is_null_in_json(tmp_path):
    path = write(tmp_path / "a.txt", val(0, 10, 5.5, 0) + val(10, 10, "nan", 500))
    assert show(path)[0]["val_loss"] is None
    assert "its last validation loss is nan" in logbook("stats", path, status=2).stderr


# ----------------------------------------------------------------------------------------------------------------------
# Statistics
# ----------------------------------------------------------------------------------------------------------------------

LOSSES = [3.2781, 3.2769, 3.2795, 3.2802, 3.2774, 3.2788, 3.2779, 3.2791]
TIMES = [80_120, 80_310, 79_980, 80_050, 80_200, 80_090, 80_150, 80_010]


def test_stats_agree_with_scipys_t_test(tmp_path):
    scipy_stats = pytest.importorskip("scipy.stats")
    answer = json.loads(logbook("stats", "--json", *sample(tmp_path, LOSSES, TIMES)).stdout)
    assert answer["p"] == pytest.approx(scipy_stats.ttest_1samp(LOSSES, 3.28, alternative="less").pvalue, rel=1e-6)
    for key, values in (("loss", LOSSES), ("time_ms", TIMES)):
        mean = sum(values) / 8
        sd = (sum((value - mean) ** 2 for value in values) / 7) ** 0.5
        assert answer[key] == pytest.approx({"n": 8, "mean": mean, "sd": sd, "min": min(values), "max": max(values)})
    assert (answer["n"], answer["target"], answer["significant"], answer["more_runs"]) == (8, 3.28, True, 0)


def test_stats_say_how_many_more_runs_would_make_it_significant(tmp_path):
    scipy_stats = pytest.importorskip("scipy.stats")
    losses = [3.2790, 3.2812, 3.2781, 3.2805, 3.2795]
    mean, sd = statistics.mean(losses), statistics.stdev(losses)
    n = next(n for n in range(5, 10_000) if scipy_stats.t.cdf((mean - 3.28) * n**0.5 / sd, n - 1) < 0.01)
    runs = sample(tmp_path, losses)
    assert f"not significant; more runs needed: {n - 5} if" in logbook("stats", *runs, status=1).stdout
    assert json.loads(logbook("stats", "--json", *runs, status=1).stdout)["more_runs"] == n - 5


def test_no_number_of_runs_helps_a_mean_above_the_target(tmp_path):
    runs = sample(tmp_path, LOSSES)
    assert "more runs needed: never" in logbook("stats", "--target", "3.27", *runs, status=1).stdout


def test_runs_without_a_spread_prove_nothing(tmp_path):
    assert "a single run has no spread" in logbook("stats", *sample(tmp_path / "a", [3.0]), status=1).stdout
    assert "these runs have no spread" in logbook("stats", *sample(tmp_path / "b", [3.0, 3.0]), status=1).stdout


def test_a_run_that_did_not_finish_is_left_out_by_name(tmp_path):
    runs = sample(tmp_path, LOSSES)
    killed = write(tmp_path / "killed.txt", val(500, 1000, 3.0, 40_000) + train(700, 1000, 2.9, 56_000))
    done = logbook("stats", *runs, killed, status=2)
    assert "n = 8\n" in done.stdout
    assert done.stderr == f"logbook.py: {killed}: left out: stops at step 700 of 1000, last validated at step 500\n"


def test_a_log_that_is_named_twice_counts_once(tmp_path):
    runs = sample(tmp_path, LOSSES)
    done = logbook("stats", *runs, runs[0])
    assert "n = 8\n" in done.stdout and "named twice" in done.stderr


# ----------------------------------------------------------------------------------------------------------------------
# Experiments
# ----------------------------------------------------------------------------------------------------------------------

TINY = {"preset": "tiny", "steps": 100, "muon_lr": 0.023, "val_tokens": 524_288}
TINY |= {"train_files": "x/sympy_train_*.bin", "val_files": "x/sympy_val_*.bin"}
CLEAN = "0123456789abcdef0123456789abcdef01234567 clean"


def experiment(folder, losses, source=b"a = 1\n", ms=5000, first_seed=1, **changes):
    """Logs of ours of runs of one experiment, with seeds from `first_seed` on, whose settings have the changes."""
    logs = []
    for seed, loss in enumerate(losses, first_seed):
        settings = TINY | {"seed": seed, "run_id": f"r{seed}", "model": {"dim": 256, "xsa": True}} | changes
        lines = val(0, 100, 5.5, 0) + val(100, 100, loss, ms + 7 * seed)
        text = our_log(source, lines, settings=settings, commit=CLEAN)
        logs.append(write(folder / f"run_{seed}.txt", text))
    return logs


TINY_LOSSES = [1.41, 1.42, 1.40]


def test_stats_take_experiments_apart_and_say_how_they_differ(tmp_path):
    pytest.importorskip("scipy")
    a = experiment(tmp_path / "a", TINY_LOSSES)
    b = experiment(tmp_path / "b", [1.45, 1.46], muon_lr=0.03, model={"dim": 256, "xsa": False})
    c = experiment(tmp_path / "c", [1.39, 1.38], source=b"a = 2\nb = 3\n")
    done = logbook("stats", "--json", *a, *b, *c, status=1)
    answers = json.loads(done.stdout)["experiments"]
    assert [answer["n"] for answer in answers] == [3, 2, 2]
    assert [answer["loss"]["mean"] for answer in answers] == pytest.approx([1.41, 1.455, 1.385])
    assert [answer["logs"] for answer in answers] == [[str(path) for path in logs] for logs in (a, b, c)]
    assert [answer["differs_from_first"] for answer in answers] == [
        [], ["muon_lr 0.03, not 0.023", "model.xsa false, not true"],
        ["another script (+2 -1 lines)"],
    ]  # fmt: skip
    assert done.stderr == "logbook.py: these runs are of 3 experiments, which are not taken together\n"
    text = logbook("stats", *a, *b, *c, status=1).stdout
    assert f"Experiment 2: {b[0]} and 1 more (differs from experiment 1: muon_lr 0.03, not 0.023; model.xsa" in text


def test_what_cannot_matter_does_not_part_an_experiment(tmp_path):
    pytest.importorskip("scipy")
    runs = experiment(tmp_path, TINY_LOSSES)
    changes = {"val_every": 10, "checkpoint_every": 50, "resume": "a.pt", "wandb": "w"}
    changes["model"] = {"dim": 256.0, "xsa": True}  # as an option of a number that need not be whole is read
    runs += experiment(tmp_path, [1.40], first_seed=9, val_files="y/sympy_val_*.bin", **changes)
    done = logbook("stats", "--json", *runs)
    assert json.loads(done.stdout)["n"] == 4 and done.stderr == ""


def test_public_logs_are_of_one_experiment_if_their_scripts_and_steps_are_the_same(tmp_path):
    pytest.importorskip("scipy")

    def log(name, script, loss, total=100):
        text = f"{script}\n{RULE}\nRunning Python 3.12\n{RULE}\n{val(total, total, loss, 5000)}"
        return write(tmp_path / name, text)

    runs = [log("a.txt", "import torch", 3.2711), log("b.txt", "import torch", 3.2712)]
    assert json.loads(logbook("stats", "--json", *runs).stdout)["n"] == 2
    runs += [log("c.txt", "import numpy", 3.273), log("d.txt", "import torch", 3.274, total=120)]
    answers = json.loads(logbook("stats", "--json", *runs, status=1).stdout)["experiments"]
    assert [answer["differs_from_first"] for answer in answers] == [
        [], ["another script (+1 -1 lines)"], ["steps 120, not 100"],
    ]  # fmt: skip


def test_the_target_is_that_of_the_preset(tmp_path):
    pytest.importorskip("scipy")

    def target(name, *options, **changes):
        logs = experiment(tmp_path / name, [1.3, 1.31, 1.305], **changes)
        return json.loads(logbook("stats", "--json", *logs, *options).stdout)["target"]

    readme = (ROOT / "records" / "README.md").read_text(encoding="utf-8")
    of_track = dict(re.findall(r"<!-- leaderboard: (\S+), target ([\d.]+) -->", readme))
    assert target("a") == float(of_track["tiny"])
    assert target("b", preset="record") == float(of_track["8xh100"]) == 3.28
    assert target("c", preset="of my own") == 3.28
    assert target("d", "--target", "1.5") == 1.5
    track = (ROOT / "records" / "optimizer_track" / "README.md").read_text(encoding="utf-8")
    assert target("e", preset="laptop") == float(re.search(r"^Target: ([\d.]+) nats", track, re.MULTILINE)[1])
    assert logbook("stats", *sample(tmp_path / "f", LOSSES)).stdout.count("<= 3.28)") == 1


def test_the_optimizer_track_has_its_own_rule_on_fineweb(tmp_path):
    pytest.importorskip("scipy")
    options = {"preset": "fineweb", "optimizer": "muon"}
    runs = experiment(tmp_path / "a", [3.2780, 3.2782, 3.2775, 3.2783], **options)  # mean 3.2780: 0.0020 * 2 = 0.004
    answer = json.loads(logbook("stats", "--json", *runs).stdout)
    assert answer["margin"] == pytest.approx((3.28 - 3.2780) * 4**0.5) and answer["significant"]
    assert "significant ((target - mean) * sqrt(n) >= 0.004)" in logbook("stats", *runs).stdout
    runs = experiment(tmp_path / "b", [3.2791, 3.2789], **options)  # 0.0010 below: it takes 16 runs
    answer = json.loads(logbook("stats", "--json", *runs, status=1).stdout)
    assert (answer["significant"], answer["more_runs"]) == (False, 14)
    runs = experiment(tmp_path / "c", [3.2791, 3.2811], **options)
    assert "more runs needed: never" in logbook("stats", *runs, status=1).stdout
    runs = experiment(tmp_path / "d", [3.2770, 3.2760, 3.2765], preset="laptop", optimizer="muon")
    assert "margin" not in json.loads(logbook("stats", "--target", "3.28", "--json", *runs).stdout)


def test_compare_pairs_runs_by_seed_where_both_sides_have_the_same(tmp_path):
    scipy_stats = pytest.importorskip("scipy.stats")
    left, right = [1.41, 1.44, 1.40, 1.45], [1.42, 1.43, 1.42, 1.48]
    a = experiment(tmp_path / "a", left)
    b = experiment(tmp_path / "b", right, source=b"b = 1\n", ms=5500)
    answer = json.loads(logbook("compare", "--json", *a, "--vs", *reversed(b)).stdout)["loss"]
    test = scipy_stats.ttest_rel(left, right)
    interval = test.confidence_interval(0.95)
    assert answer["test"] == "paired t-test" and answer["p"] == pytest.approx(test.pvalue, rel=1e-6)
    assert answer["ci95"] == pytest.approx([interval.low, interval.high], rel=1e-6)
    assert "paired t-test by seed" in logbook("compare", *a, "--vs", *b).stdout
    unpaired = json.loads(logbook("compare", "--json", *a, "--vs", *b[1:]).stdout)["loss"]
    assert unpaired["test"] == "Welch's t-test"
    assert unpaired["p"] == pytest.approx(scipy_stats.ttest_ind(left, right[1:], equal_var=False).pvalue, rel=1e-6)


def test_compare_tells_in_what_else_the_runs_differ(tmp_path):
    pytest.importorskip("scipy")
    settings = [TINY | {"seed": 1}, TINY | {"seed": 1}, TINY | {"seed": 2, "muon_lr": 0.5}]
    lines = [val(100, 100, loss, ms) for loss, ms in ((1.41, 5000), (1.42, 5001), (1.43, 5002))]
    a = [
        write(tmp_path / f"{i}.txt", our_log(lines=line, settings=each, commit=CLEAN))
        for i, (line, each) in enumerate(zip(lines, settings, strict=True))
    ]
    b = write(tmp_path / "b.txt", our_log(hardware="8 x H100").replace(b"world size: 1", b"world size: 8"))
    said = [line.removeprefix("logbook.py: ") for line in logbook("compare", *a, "--vs", b).stderr.splitlines()]
    assert said == [
        f"A takes experiments together: {a[2]}: muon_lr 0.5, not 0.023",
        "A: repeated seeds, so not independent: 1 (2 times)",
        "A and B: different hardware: 8 x H100; AMD EPYC, 2 cores",
        "A and B: different world sizes: 1, 8",
        "A and B: 1 of 4 with uncommitted changes in the working tree",
    ]


def test_compare_takes_no_presets_together(tmp_path):
    a = experiment(tmp_path / "a", TINY_LOSSES)
    b = experiment(tmp_path / "b", [1.2, 1.21], preset="mini")
    c = experiment(tmp_path / "c", [1.3, 1.31])
    line = mistake("compare", *a, *b, "--vs", *c)
    assert line == "logbook.py: A has runs of the presets mini, tiny: give those of one"


def test_plot_draws_an_experiment_as_one_curve_and_several_as_several(tmp_path):
    pytest.importorskip("matplotlib")
    runs = experiment(tmp_path / "mine", TINY_LOSSES)
    more = our_log(b"a = 1\n", val(0, 100, 5.5, 0) + val(50, 100, 2.0, 2000) + val(100, 100, 1.43, 5100), commit=CLEAN,
                   settings=TINY | {"seed": 9, "model": {"dim": 256, "xsa": True}, "val_every": 50})  # fmt: skip
    runs.append(write(tmp_path / "mine" / "run_9.txt", more))
    runs += experiment(tmp_path / "mine", [1.5, 1.51], first_seed=20, muon_lr=0.03)
    runs += experiment(tmp_path / "other", [1.6, 1.61], muon_lr=0.04)
    logbook("plot", *runs, "--out", tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text(encoding="utf-8")
    for words in (">mine (4 runs)<", ">mine, muon_lr 0.03 (2 runs)<", ">other (2 runs)<", ">target 1.44<"):
        assert words in text, words
    logbook("plot", runs[0], runs[-1].with_name("run_1.txt"), "--out", tmp_path / "c.svg")
    assert all(words in (tmp_path / "c.svg").read_text(encoding="utf-8") for words in (">mine<", ">other<"))
    done = logbook("plot", "--group", "Both", *runs[:6], "--out", tmp_path / "b.svg")
    assert "Both: a curve an experiment: " in done.stderr and ">Both (4 runs)<" in (tmp_path / "b.svg").read_text()


@pytest.mark.parametrize(
    "names",
    [
        ["short"],
        ["a name of a middling length"] * 5,
        ["one whose name takes half of the width, with all its words"] * 7,
        ["short", "words " * 60],
    ],
)
def test_the_legend_of_a_plot_lies_within_it(names, tmp_path):
    pytest.importorskip("matplotlib")
    logs = experiment(tmp_path, [1.4, 1.41])
    runs, _ = log_reader.read_logs([str(path) for path in logs])
    matplotlib = plots.load_matplotlib()
    figure = plots.draw(matplotlib, [plots.Curve(name, runs) for name in names], [1.44])
    figure.savefig(tmp_path / "a.png")
    place = figure.legends[0].get_window_extent()
    assert len(figure.legends[0].get_texts()) == len(names)
    assert 0 <= place.x0 and place.x1 <= figure.bbox.width and place.y1 <= figure.bbox.height
    # The panels keep their height, below it.
    assert all(axes.bbox.y1 < place.y0 and axes.bbox.height > 300 for axes in figure.axes[:2])


# ----------------------------------------------------------------------------------------------------------------------
# A run counts once
# ----------------------------------------------------------------------------------------------------------------------

LAPTOP_RUNS = [2.4170, 2.4312, 2.4055]  # three runs prove less than the same three, twice


def a_run(number, loss, source=b"a = 1\n", hardware="AMD EPYC, 2 cores"):
    """A log of ours, and the same run's lines from 10 steps after its start on."""
    lines = [val(0, 100, 5.5512, 0, 0.0)]
    for step in (25, 50, 75):
        lines += [train(step, 100, 3.0, 50 * step + number), val(step, 100, 6 - loss + step / 1000, 50 * step + number)]
    lines += [train(100, 100, 2.2, 5000 + number), val(100, 100, loss, 5001 + number)]
    return our_log(source, "".join(lines), hardware=hardware)


def copied(runs, kind, folder):
    """Logs that hold runs of `runs` again."""
    if kind == "another name":
        return [write(folder / path.name, path.read_bytes()) for path in runs]
    if kind == "another header":
        text = [path.read_bytes().rpartition((RULE + "\n").encode())[2].decode() for path in runs]
        return [write(folder / f"{i}.txt", our_log(b"b = 2\n", t, hardware="a toaster")) for i, t in enumerate(text)]
    if kind == "one file":
        return [write(folder / "all.txt", b"".join(path.read_bytes() for path in runs))]
    if kind == "without the start":
        return [
            write(folder / path.name, path.read_bytes().rpartition(b"step:50/100 train")[2][-280:]) for path in runs
        ]
    if kind == "fewer validations":
        return [
            write(folder / path.name, re.sub(rb"step:(25|75)/100 val.*\n", b"", path.read_bytes())) for path in runs
        ]
    raise ValueError(kind)


@pytest.mark.parametrize(
    "kind", ["another name", "another header", "one file", "without the start", "fewer validations"]
)
def test_a_copy_of_a_run_is_named_and_does_not_count(kind, tmp_path):
    pytest.importorskip("scipy")
    runs = [write(tmp_path / f"{i}.txt", a_run(i, loss)) for i, loss in enumerate(LAPTOP_RUNS)]
    copies = copied(runs, kind, tmp_path / "copies")
    for given in ([*runs, *copies], [*copies, *runs]):
        done = logbook("stats", "--json", "--target", "2.45", *given, status=1)
        assert json.loads(done.stdout)["n"] == 3
        assert done.stderr.count(": counted once\n") == 3
        assert len(json.loads(logbook("show", "--json", *given).stdout)) == 3


def test_a_log_cut_short_is_a_part_of_the_whole_one(tmp_path):
    whole = write(tmp_path / "whole.txt", a_run(0, 2.4))
    cut = write(tmp_path / "cut.txt", a_run(0, 2.4).partition(b"step:75/100 val")[0])
    done = logbook("show", "--json", cut, whole)
    assert [row["file"] for row in json.loads(done.stdout)] == [str(whole)]
    assert done.stderr == f"logbook.py: {cut}: repeats a part of {whole}: counted once\n"


def test_lines_that_are_written_twice_are_one_run(tmp_path):
    lines = [val(0, 100, 5.5, 0), train(50, 100, 3.0, 2500), val(50, 100, 3.1, 2501), val(100, 100, 2.9, 5000)]
    done = logbook("show", "--json", write(tmp_path / "a.txt", "".join(line * 2 for line in lines)))
    assert [(row["final_step"], row["val_loss"]) for row in json.loads(done.stdout)] == [(100, 2.9)]
    assert (
        done.stderr == f"logbook.py: {tmp_path / 'a.txt'}: the same validation lines follow each other: counted once\n"
    )
    log = write(tmp_path / "twice.txt", "".join(lines * 2))
    done = logbook("show", "--json", log)
    assert len(json.loads(done.stdout)) == 1
    assert done.stderr == f"logbook.py: {log} run 2: repeats {log} run 1: counted once\n"


def test_runs_that_share_their_first_loss_or_one_time_are_not_copies(tmp_path):
    lines = [
        val(0, 100, 5.5, 0) + train(40, 100, 3.0, 2000),  # killed, and so is the next
        val(0, 100, 5.5, 0) + train(40, 100, 3.0, 2001),
        val(0, 100, 5.5, 0) + val(100, 100, 2.9, 5000),
        val(0, 100, 5.5, 0) + val(100, 100, 2.9, 5001),
        val(0, 100, 5.5, 0) + val(100, 100, 2.8, 5000),
        val(0, 200, 5.5, 0) + val(100, 200, 2.9, 5000),
        "s:0 tel:10.9\ns:100 tel:3.4\n",
        "s:0 tel:10.9\ns:50 tel:3.6\ns:100 tel:3.4\n",  # no times: nothing says that the one above is a part of it
    ]
    done = logbook("show", "--json", *(write(tmp_path / f"{i}.txt", text) for i, text in enumerate(lines)))
    assert len(json.loads(done.stdout)) == len(lines) and done.stderr == ""


def test_compare_and_plot_count_a_copy_once(tmp_path):
    pytest.importorskip("scipy")
    pytest.importorskip("matplotlib")
    a, b = sample(tmp_path / "a", LOSSES, TIMES), sample(tmp_path / "b", [3.29, 3.30, 3.31])
    again = write(tmp_path / "a" / "again.txt", a[0].read_bytes())
    done = logbook("compare", "--json", *a, again, "--vs", *b, a[1])
    answer = json.loads(done.stdout)["loss"]
    assert (answer["a"]["n"], answer["b"]["n"]) == (8, 3)
    assert done.stderr.splitlines() == [
        f"logbook.py: {again}: repeats {a[0]}: counted once", f"logbook.py: {a[1]}: repeats {a[1]}: counted once",
    ]  # fmt: skip
    assert "nothing to compare" in logbook("compare", *a, "--vs", again, status=2).stderr
    logbook("plot", *a, again, "--out", tmp_path / "a.svg")
    assert ">a (8 runs)<" in (tmp_path / "a.svg").read_text(encoding="utf-8")


def test_compare_agrees_with_welchs_t_test(tmp_path):
    scipy_stats = pytest.importorskip("scipy.stats")
    others, other_times = [3.2801, 3.2825, 3.2790, 3.2815], [81_000, 81_500, 80_700, 80_900]
    a, b = sample(tmp_path / "a", LOSSES, TIMES), sample(tmp_path / "b", others, other_times)
    answer = json.loads(logbook("compare", "--json", *a, "--vs", *b).stdout)
    for key, left, right in (("loss", LOSSES, others), ("time_ms", TIMES, other_times)):
        test = scipy_stats.ttest_ind(left, right, equal_var=False)
        interval = test.confidence_interval(0.95)
        assert answer[key]["difference"] == pytest.approx(sum(left) / 8 - sum(right) / 4)
        assert answer[key]["p"] == pytest.approx(test.pvalue, rel=1e-6)
        assert answer[key]["ci95"] == pytest.approx([interval.low, interval.high], rel=1e-6)
    assert re.search(r"^loss +8 +4 +3\.27849 +3\.28078 +-0\.00229 ", logbook("compare", *a, "--vs", *b).stdout, re.M)


def test_compare_does_without_times(tmp_path):
    pytest.importorskip("scipy")
    logs = [write(tmp_path / f"{i}.log", f"s:0 tel:10.9\ns:90 tel:3.{i}\n") for i in range(27, 31)]
    done = logbook("compare", *logs[:2], "--vs", *logs[2:])
    assert "time" not in done.stdout and len(done.stdout.splitlines()) == 2


@pytest.mark.parametrize(
    "settings",
    ['{"seed": [1], "preset": ["tiny"], "val_files": 5}', "{" + '"a": {' * 5000, '{"a": ' + "[" * 30_000, '{"a": NaN}'],
    ids=["lists", "deep objects", "deep lists", "not a number"],
)
def test_settings_may_be_anything(tmp_path, settings):
    pytest.importorskip("scipy")
    logs = []
    for i in range(2):
        text = our_log(lines=val(9, 9, 3.1 + i / 100, 50)).replace(b'{"preset": "tiny", "seed": 1}', settings.encode())
        logs.append(write(tmp_path / f"{i}.txt", text))
    logbook("show", *logs)
    logbook("stats", *logs, "--target", "3", status=1)
    logbook("compare", logs[0], "--vs", logs[1])
    logbook("diff", *logs)


def test_compare_gives_no_interval_for_a_single_run(tmp_path):
    a, b = sample(tmp_path / "a", LOSSES), sample(tmp_path / "b", [3.29])
    answer = json.loads(logbook("compare", "--json", *a, "--vs", *b).stdout)
    assert answer["loss"]["difference"] == pytest.approx(sum(LOSSES) / 8 - 3.29)
    assert answer["loss"]["p"] is None


@pytest.mark.parametrize("package", ["scipy", "matplotlib"])
def test_a_missing_package_is_one_line_and_show_does_without(tmp_path, package):
    write(tmp_path / "missing" / f"{package}.py", "raise ImportError")
    env = os.environ | {"PYTHONPATH": str(tmp_path / "missing")}
    runs = sample(tmp_path, LOSSES)
    command = {"scipy": ["stats", *runs], "matplotlib": ["plot", *runs, "--out", tmp_path / "a.png"]}[package]
    line = mistake(*command, env=env)
    assert line.startswith(f"logbook.py: {package} is missing: ")
    # The command works where it is read: it is this Python's, and the file is there.
    python, *words, file = shlex.split(line.split(": ", 2)[2])
    assert python == sys.executable and words == ["-m", "pip", "install", "-r"]
    assert Path(file).resolve() == ROOT / "records" / "requirements.txt" and package in Path(file).read_text()
    logbook("show", *runs, env=env)


# ----------------------------------------------------------------------------------------------------------------------
# plot
# ----------------------------------------------------------------------------------------------------------------------


def test_plot_draws_groups_runs_that_stopped_and_logs_without_times(tmp_path):
    pytest.importorskip("matplotlib")
    runs = sample(tmp_path / "mine_$2", LOSSES)
    killed = write(tmp_path / "mine_$2" / "_killed.txt", val(0, 1000, 10.8, 0) + val(500, 1000, 4.4, 40_000))
    old = write(tmp_path / "old.log", "s:0 tel:10.9\ns:9000 tel:3.4\ns:18000 tel:3.27\n")
    picture = tmp_path / "runs.svg"
    assert logbook("plot", *runs, killed, "--group", "An old one", old, "--out", picture).stderr == ""
    text = picture.read_text(encoding="utf-8")
    for words in (">mine_$2 (8 runs)<", ">killed<", ">An old one<", ">Training time (s)<"):
        assert words in text, words


def test_plot_writes_a_png_of_a_size_to_publish(tmp_path):
    pytest.importorskip("matplotlib")
    logbook("plot", *sample(tmp_path, LOSSES), "--out", tmp_path / "runs.png")
    content = (tmp_path / "runs.png").read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert int.from_bytes(content[16:20], "big") >= 2000  # pixels across


def test_a_plot_that_fails_leaves_the_picture_as_it_was(tmp_path):
    pytest.importorskip("matplotlib")
    picture = write(tmp_path / "runs.png", "the old picture")
    logbook("plot", write(tmp_path / "a.txt", val(0, 10, 5.5, 0)), "--out", picture, status=2)
    assert "must end in .png" in mistake("plot", picture, "--out", tmp_path / "runs.doc")
    assert "No such file" in mistake("plot", *sample(tmp_path, [3.1]), "--out", tmp_path / "no" / "runs.png")
    assert "is not a file" in mistake(
        "plot", *sample(tmp_path, [3.1]), "--out", write(tmp_path / "d.png" / "x", "").parent
    )
    assert picture.read_text() == "the old picture"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00.txt", "a.txt", "d.png", "runs.png"]


# ----------------------------------------------------------------------------------------------------------------------
# extract
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source",
    [
        b"print('hello')\n",
        b"print('no line end')",
        b"",
        b"# \xff\xfe not UTF-8\r\nmixed\nline ends\r\n\n\n",
        f"{RULE}\n{RULE}\nsource: 0 bytes, sha256 {'0' * 64}\n{RULE}".encode(),
    ],
)
def test_extract_gives_back_the_script_byte_for_byte(tmp_path, source):
    out = tmp_path / "train.py"
    done = logbook("extract", write(tmp_path / "a.txt", our_log(source)), "--out", out)
    assert out.read_bytes() == source
    assert "checksum matches" in done.stdout and done.stderr == ""


def test_an_extracted_script_runs_wherever_it_lies(tmp_path):
    pytest.importorskip("torch")
    source = (ROOT / "records" / "optimizer_track" / "train.py").read_bytes()
    logbook("extract", write(tmp_path / "a.txt", our_log(source)), "--out", tmp_path / "again.py")
    assert "usage: again.py" in logbook("--help", script=tmp_path / "again.py").stdout


@pytest.mark.parametrize("damage", [(b"hello", b"hellx"), (b"hello", b"hello there"), (b"source: ", b"source: 1")])
def test_extract_refuses_a_source_that_does_not_match_its_checksum(tmp_path, damage):
    log = write(tmp_path / "a.txt", our_log().replace(*damage))
    assert "does not match its checksum" in mistake("extract", log, "--out", tmp_path / "train.py")
    assert not (tmp_path / "train.py").exists()
    done = logbook("show", "--json", log)
    assert "does not match its checksum" in done.stderr and json.loads(done.stdout)[0]["val_loss"] == 2.1034


def test_extract_says_that_nothing_vouches_for_a_public_logs_script(tmp_path):
    log = write(
        tmp_path / "a.txt", f"import torch\nprint(1)\n{RULE}\nRunning Python 3.12\n{RULE}\n{val(5, 5, 3.5, 10)}"
    )
    done = logbook("extract", log, "--out", tmp_path / "train.py")
    assert (tmp_path / "train.py").read_text() == "import torch\nprint(1)\n"
    assert "no checksum vouches" in done.stderr


def test_extract_takes_the_script_of_2024_from_between_two_rules(tmp_path):
    source = f"import torch\n{FAKE_LINES}print(1)\n"
    smi = "|   0  NVIDIA H100 80GB HBM3          Off |   00000000:18:00.0 Off |                    0 |\n"
    text = f"{RULE}\n{source}{RULE}\nRunning pytorch 2.5.0+cu124 compiled for CUDA 12.4\n{smi}{RULE}\n"
    log = write(tmp_path / "a.txt", text + val(5, 5, 3.5, 10))
    logbook("extract", log, "--out", tmp_path / "train.py")
    assert (tmp_path / "train.py").read_text() == source
    done = logbook("show", log)
    assert "3.5000" in done.stdout and "1 x NVIDIA H100 80GB HBM3" in done.stdout and len(done.stdout.splitlines()) == 2
    headless = write(tmp_path / "b.txt", f"{RULE}\nRunning Python 3.12\n{RULE}\n{val(5, 5, 3.4, 10)}")
    bare = write(tmp_path / "c.txt", f"{RULE}\n{val(5, 5, 3.3, 10)}{RULE}\n{val(5, 5, 3.2, 10)}")
    assert [row["val_loss"] for row in show(headless, bare)] == [3.4, 3.3, 3.2]
    assert "holds no script" in mistake("extract", headless, "--out", tmp_path / "none.py")


def glued(**kernels):
    """What the public logs since January 2026 begin with: the script, and each of the kernels' files after its name."""
    dashes = "-" * 40
    parts = ["import triton_kernels\n\nx = 1\n# " + "-" * 77 + "\n"]
    parts += [f"\n\n{dashes}\n# {name}.py\n{dashes}\n\n{text}" for name, text in kernels.items()]
    return "".join(parts)


def test_extract_takes_the_kernels_files_apart_that_public_logs_hold_since_2026(tmp_path):
    kernels = {"triton_kernels": "import triton\n\ny = 2\n", "dc_triton_kernels": '"""Docs."""\nz = 3\n'}
    text = f"{glued(**kernels)}\n{RULE}\nRunning Python 3.12\n{RULE}\n{val(5, 5, 3.5, 10)}"
    log, out = write(tmp_path / "a.txt", text), tmp_path / "out" / "train.py"
    out.parent.mkdir()
    lines = logbook("extract", log, "--out", out).stdout.splitlines()
    assert [line.partition(": ")[0] for line in lines] == [
        str(out), str(out.with_name("triton_kernels.py")), str(out.with_name("dc_triton_kernels.py")),
    ]  # fmt: skip
    assert out.read_text() == glued()
    for name, kernel in kernels.items():
        assert out.with_name(f"{name}.py").read_text().rstrip("\n") == kernel.rstrip("\n")
    for path in out.parent.iterdir():
        compile(path.read_text(), path, "exec")
    out.with_name("dc_triton_kernels.py").write_text("hours of work")
    out.unlink()
    assert "dc_triton_kernels.py: exists and differs" in mistake("extract", log, "--out", out)
    assert "one of the kernels' files" in mistake("extract", log, "--out", tmp_path / "triton_kernels.py")
    assert not out.exists()


def test_extract_finds_no_script_where_there_is_none(tmp_path):
    for text in (val(5, 5, 3.5, 10), f"{RULE}\nRunning Python 3.12\n", f"Running Python 3.12\n{RULE}\n"):
        assert "holds no script" in mistake("extract", write(tmp_path / "a.txt", text), "--out", tmp_path / "train.py")


def test_extract_does_not_overwrite_another_file(tmp_path):
    log, out = write(tmp_path / "a.txt", our_log()), write(tmp_path / "train.py", "hours of work")
    assert "is left as it is" in mistake("extract", log, "--out", out)
    assert out.read_text() == "hours of work"
    out.unlink()
    logbook("extract", log, "--out", out)
    logbook("extract", log, "--out", out)


# ----------------------------------------------------------------------------------------------------------------------
# diff, and the way to a target
# ----------------------------------------------------------------------------------------------------------------------


def test_diff_shows_what_differs_in_settings_and_script(tmp_path):
    (a,) = experiment(tmp_path / "a", [1.4], b"import torch\nx = 1\n")
    (b,) = experiment(tmp_path / "b", [1.4], b"import torch\nx = 2\n", muon_lr=0.03, model={"dim": 512, "xsa": True})
    lines = logbook("diff", a, b).stdout.splitlines()
    assert lines[:2] == [f"--- {a} (settings)", f"+++ {b} (settings)"]
    assert [line for line in lines if line[0] in "+-" and line[:3] not in ("---", "+++")] == [
        "-model.dim: 256", "+model.dim: 512", "-muon_lr: 0.023", "+muon_lr: 0.03", "-x = 1", "+x = 2",
    ]  # fmt: skip
    assert logbook("diff", a, a).stdout == "no difference\n"


def test_diff_compares_a_log_with_a_script_of_any_name(tmp_path):
    (log,) = experiment(tmp_path, [1.4], b"x = 1\n")
    for name in ("train.py", "attempt"):
        script = write(tmp_path / name, "x = 2\n")
        done = logbook("diff", log, script)
        assert done.stdout.splitlines()[-2:] == ["-x = 1", "+x = 2"]
        assert done.stderr == f"logbook.py: {script}: has no settings: not compared\n"
    no_script = write(tmp_path / "a.txt", val(5, 5, 3.5, 10))
    assert "have neither settings nor scripts" in mistake("diff", no_script, script)
    damaged = write(tmp_path / "b.txt", our_log().replace(b"hello", b"hellx"))
    assert "does not match its checksum" in mistake("diff", damaged, script)


def test_show_gives_steps_and_time_to_a_target_on_a_line_between_validations(tmp_path):
    lines = val(0, 100, 5.0, 0) + val(40, 100, 3.0, 4000) + val(80, 100, 3.2, 8000) + val(100, 100, 2.0, 10_000)
    path = write(tmp_path / "a.txt", lines)
    # From (40, 3.0) up to (80, 3.2), and down to (100, 2.0): 2.5 after (3.2 - 2.5) / 1.2 of 20 steps and of 2 s.
    for target, steps, ms in ((4.0, 20, 2000), (3.0, 40, 4000), (2.5, 80 + 20 * 0.7 / 1.2, 8000 + 2000 * 0.7 / 1.2)):
        (row,) = json.loads(logbook("show", "--json", "--target", target, path).stdout)
        assert (row["steps_to_target"], row["time_ms_to_target"]) == pytest.approx((steps, ms))
    assert re.search(
        r"steps to 2\.5 +time to 2\.5\n.* 92 +9,167 ms$", logbook("show", "--target", 2.5, path).stdout, re.M
    )
    (row,) = json.loads(logbook("show", "--json", "--target", 1.9, path).stdout)
    assert row["steps_to_target"] is None and row["time_ms_to_target"] is None
    old = write(tmp_path / "old.log", "s:0 tel:11.0\ns:100 tel:3.0\n")
    (row,) = json.loads(logbook("show", "--json", "--target", 7, old).stdout)
    assert row["steps_to_target"] == 50 and row["time_ms_to_target"] is None


# ----------------------------------------------------------------------------------------------------------------------
# leaderboard
# ----------------------------------------------------------------------------------------------------------------------


SOURCES = {name: f"# {name}\n".encode() for name in "abc"}
# By record: losses, milliseconds of training.
RECORDS = {"a": ([1.43, 1.4302, 1.4301], 9000), "b": ([1.42, 1.421, 1.423], 8000)}


def checked(source):
    return f"Checked: legal (2026-06-01), sha256 {hashlib.sha256(source).hexdigest()}\n"


def put_record(folder, title, source, losses, ms, **changes):
    write(folder / "README.md", f"# {title}\n\nWhat changed: much.\n\nContributors: @me\n\n{checked(source)}")
    return experiment(folder, losses, source, ms, **changes)


@pytest.fixture
def records(tmp_path):
    """A records folder of our own with two records, and the logbook that works on it."""
    folder = tmp_path / "records"
    write(
        folder / "README.md",
        "# Records\n\nBefore.\n\n<!-- leaderboard: tiny, target 1.44 -->\nold\n<!-- end of table -->\n\nAfter.\n"
        "<!-- leaderboard: 8xh100, target 3 -->\n<!-- end of table -->\n",
    )
    put_record(folder / "tiny" / "2026-05_a", "A", SOURCES["a"], *RECORDS["a"])
    put_record(folder / "tiny" / "2026-06-02_b", "B | b", SOURCES["b"], *RECORDS["b"])
    for module in LOGBOOK.parent.glob("*.py"):
        shutil.copy(module, folder)
    shutil.copy(ROOT / "command.py", tmp_path)
    return folder


def titles(records):
    return re.findall(r"^\| \d+ \| [\d-]+ \| \[(.*?)\]\(", (records / "README.md").read_text(encoding="utf-8"), re.M)


def test_leaderboard_writes_the_tables_between_the_markers(records):
    scipy_stats = pytest.importorskip("scipy.stats")
    script = records / "logbook.py"
    assert logbook("leaderboard", "--check", status=1, script=script).stderr == ""
    logbook("leaderboard", script=script)
    lines = (records / "README.md").read_text(encoding="utf-8").splitlines()
    assert lines[:5] == ["# Records", "", "Before.", "", "<!-- leaderboard: tiny, target 1.44 -->"]
    p_a, p_b = (scipy_stats.ttest_1samp(losses, 1.44, alternative="less").pvalue for losses, _ in RECORDS.values())
    assert p_a < 0.0001 < p_b < 0.01
    end = "| 2026-06-01 | @me |"
    assert lines[7:9] == [
        f"| 1 | 2026-05 | [A](tiny/2026-05_a/) | 1.4301 ± 0.0001 | 3 | 9.01 s |  | {p_a:.1e} {end}",
        f"| 2 | 2026-06-02 | [B \\| b](tiny/2026-06-02_b/) | 1.4213 ± 0.0015 | 3 | 8.01 s |  | {p_b:.4f} {end}",
    ]
    assert lines[9:] == ["<!-- end of table -->", "", "After.", "<!-- leaderboard: 8xh100, target 3 -->",
                         "No records yet.", "<!-- end of table -->"]  # fmt: skip


def put_gpu_record(folder, title, source, losses, ms, hardware, lines=None, **changes):
    """A record on FineWeb, with the checksums that a log has of its data."""
    stream = {"preset": "record", "val_tokens": 10_485_760, "val_files": "data/fineweb10B/fineweb_val_*.bin"}
    stream |= {"train_files": "data/fineweb10B/fineweb_train_*.bin"}
    logs = put_record(folder, title, source, losses, ms, **(stream | changes))
    lines = lines or (
        f"validation stream: 10,485,761 tokens, sha256 {'ab' * 32}\n"
        f"data: train data/fineweb10B/fineweb_train_000001.bin 100,000,000 tokens, sha256 {'cd' * 32}"
    )
    for path in logs:
        text = path.read_bytes().replace(b"hardware: AMD EPYC, 2 cores", f"hardware: {hardware}".encode())
        path.write_bytes(text.replace(b"\ndata: train", f"\n{lines}\ndata: train".encode()))
    return logs


H100, RTX4090 = "NVIDIA H100 80GB HBM3", "NVIDIA GeForce RTX 4090"
GPU_LOSSES = [3.27, 3.271, 3.272]


def test_the_track_of_one_gpu_has_a_table_for_each_card(records):
    pytest.importorskip("scipy")
    script, readme = records / "logbook.py", records / "README.md"
    cards = {"h100": (H100, 1000), "rtx4090": (RTX4090, 9000)}  # neither is held against the other
    for card, (name, ms) in cards.items():
        put_gpu_record(records / "1gpu" / card / "2026-05_a", f"On {card}", SOURCES["a"], GPU_LOSSES, ms, f"1 x {name}")
    line = mistake("leaderboard", script=script)
    assert "1gpu/h100: README.md has no table for it (<!-- leaderboard: 1gpu/h100, target ... -->)" in line
    for card in "rtx4090", "h100":
        with open(readme, "a") as file:
            file.write(f"<!-- leaderboard: 1gpu/{card}, target 3.28 -->\n<!-- end of table -->\n")
    logbook("leaderboard", script=script)
    assert titles(records)[-2:] == ["On rtx4090", "On h100"] and "](1gpu/rtx4090/2026-05_a/)" in readme.read_text()


def test_a_record_on_gpus_ran_on_its_tracks_and_in_turn_with_the_one_before(records):
    pytest.importorskip("scipy")
    script, track = records / "logbook.py", records / "8xh100"
    table = (records / "README.md").read_text().replace("8xh100, target 3 ", "8xh100, target 3.28 ")
    write(records / "README.md", table)
    put_gpu_record(track / "2026-05_a", "First", SOURCES["a"], GPU_LOSSES, 80_000, f"8 x {H100}")

    def refusal(hardware=f"8 x {H100}", **changes):
        shutil.rmtree(track / "2026-06_b", ignore_errors=True)
        put_gpu_record(track / "2026-06_b", "Second", SOURCES["b"], GPU_LOSSES, 70_000, hardware, **changes)
        return logbook("leaderboard", script=script).stderr

    assert f"ran on 8 x {RTX4090}, not on 8 x {H100}" in refusal(f"8 x {RTX4090}")
    assert f"ran on 16 x {H100}, not on 8 x" in refusal(f"16 x {H100}")
    assert "run_1.txt: has no checksums of its data" in refusal(lines="note: none")
    assert "needs runs of the record before it, 2026-05_a, made again in turn with its own" in refusal()
    again = put_gpu_record(track / "again", "", SOURCES["a"], GPU_LOSSES, 81_000, f"8 x {H100}")
    (track / "2026-06_b" / "previous").mkdir()
    for path in again:
        path.rename(track / "2026-06_b" / "previous" / path.name)
    second = track / "2026-06_b" / "previous" / "run_2.txt"  # else all differ by the same time, to a millisecond
    second.write_bytes(second.read_bytes().replace(b"81014ms", b"81020ms"))
    shutil.rmtree(track / "again")
    assert logbook("leaderboard", script=script).stderr == ""
    assert titles(records)[-2:] == ["First", "Second"]
    line = mistake("attempt", "x.py", "--track", "8xh100", "--name", "x", script=script)
    assert line == "logbook.py: 8xh100: an attempt trains in one process; make its runs with ./run.sh"


def test_a_table_needs_a_track_of_the_rules(records):
    pytest.importorskip("scipy")
    (records / "tiny").rename(records / "fast")
    write(records / "README.md", (records / "README.md").read_text().replace(": tiny,", ": fast,"))
    assert "rules.py has no such track" in logbook("leaderboard", script=records / "logbook.py").stderr


def test_a_script_may_have_the_name_of_a_part_of_the_logbook(records):
    script = write(records.parent / "attempt.py", "raise ImportError")
    line = mistake("attempt", script, "--track", "slow", "--name", "x", script=records / "logbook.py")
    assert line == "logbook.py: no track slow: there are tiny, 8xh100"


def test_leaderboard_run_again_changes_nothing(records):
    pytest.importorskip("scipy")
    script = records / "logbook.py"
    logbook("leaderboard", script=script)
    before = (records / "README.md").read_bytes()
    logbook("leaderboard", "--check", script=script)
    logbook("leaderboard", script=script)
    assert (records / "README.md").read_bytes() == before


C = "2026-06-03_c"  # a third record's folder


def put_c(records, losses=(1.41, 1.411, 1.413), ms=7000, source=SOURCES["c"], **changes):
    return put_record(records / "tiny" / C, "C", source, list(losses), ms, **changes)


def killed(records):
    put_c(records)
    write(records / "tiny" / C / "killed.txt", val(50, 100, 1.4, 4000))


def few(records):
    put_c(records, [1.41])


def copies(records):
    for path in put_c(records, [1.43, 1.40]):
        write(path.with_name(f"again_{path.name}"), path.read_bytes())


def above(records):
    put_c(records, [1.441, 1.442, 1.443])


def other_stream(records):
    put_c(records, val_tokens=1000)


def with_line(records, line):
    """Such a log whose header has one more line."""
    put_c(records)
    for path in (records / "tiny" / C).glob("*.txt"):
        path.write_bytes(path.read_bytes().replace(b"\ndata: train", f"\n{line}\ndata: train".encode()))


def other_training_files(records):
    put_c(records, train_files="data/own_*.bin")


def one_seed(records):
    put_c(records, seed=7)


def other_validation_tokens(records):
    with_line(records, f"validation stream: 524,289 tokens, sha256 {'ab' * 32}")


def other_training_shard(records):
    with_line(records, f"data: train elsewhere/sympy_train_000001.bin 5,000 tokens, sha256 {'cd' * 32}")


def clock_that_begins_again(records):
    put_c(records)
    for path in (records / "tiny" / C).glob("*.txt"):
        lines = path.read_bytes().splitlines(keepends=True)
        last = max(n for n, line in enumerate(lines) if line.startswith(b"step:"))
        lines.insert(last, lines[last].replace(b"val_loss", b"train_loss").replace(b"train_time:", b"train_time:9"))
        path.write_bytes(b"".join(lines))


def resumed(records):
    put_c(records, resume="logs/a_step000010.pt")


def no_settings(records):
    put_c(records)
    for path in (records / "tiny" / C).glob("*.txt"):
        path.write_bytes(re.sub(rb"settings: .*\n", b"", path.read_bytes()))


def mixed(records):
    put_c(records)
    experiment(records / "tiny" / C / "more", [1.40, 1.401], SOURCES["c"], 7100, muon_lr=0.5)


def unchecked(records):
    put_c(records)
    write(records / "tiny" / C / "README.md", "# C\n")


def another_script(records):
    put_c(records)
    write(records / "tiny" / C / "README.md", f"# C\n\n{checked(SOURCES['a'])}")


def not_the_first(records):
    put_c(records)
    write(records / "tiny" / C / "README.md", "# C\n\nChecked: no, I am tired\n")


def slower(records):
    put_c(records, ms=8500)


def other_hardware(records):
    for path in put_c(records):
        path.write_bytes(path.read_bytes().replace(b"hardware: AMD EPYC, 2 cores", b"hardware: a faster machine"))


def same_runs(records):
    shutil.copytree(records / "tiny" / "2026-06-02_b", records / "tiny" / C)


def no_logs(records):
    write(records / "tiny" / C / "README.md", "# C\n")


def no_title(records):
    put_c(records)
    write(records / "tiny" / C / "README.md", "no title")


def no_readme(records):
    put_c(records)
    (records / "tiny" / C / "README.md").unlink()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (killed, "holds logs that do not count"),
        (few, "not significant: n = 1, mean loss 1.4100, target 1.44, p = -, not < 0.01"),
        (copies, "not significant: n = 2, mean loss 1.4150"),
        (above, "not significant: n = 3, mean loss 1.4420, target 1.44, p = 0.9"),
        (other_stream, "validated on 1000 tokens of sympy_val_*.bin, not 524288 of sympy_val_*.bin"),
        (other_training_files, "trained on own_*.bin, not sympy_train_*.bin"),
        (one_seed, "repeated seeds, so not independent: 7 (3 times)"),
        (other_validation_tokens, f"validated on other tokens: their sha256 is {'ab' * 32}, not "),
        (other_training_shard, f"trained on other shards, one with sha256 {'cd' * 32}"),
        (no_settings, "validated on None tokens"),
        (clock_that_begins_again, "train_time goes back from 9"),
        (resumed, "goes on from logs/a_step000010.pt, and what came before is not in it"),
        (mixed, "holds runs of 2 experiments: "),
        (unchecked, "has no line 'Checked: legal (YYYY-MM-DD), sha256 "),
        (another_script, "says that another script is legal"),
        (not_the_first, "has no line 'Checked: legal"),
        (slower, "is not faster than the record before it, 2026-06-02_b: 8.51 s, not less than 8.01 s"),
        (other_hardware, "was timed on other hardware (AMD EPYC, 2 cores)"),
        (same_runs, "has no runs that are not those of the record before it"),
        (no_logs, "holds no logs"),
        (no_title, "has no heading"),
        (no_readme, "No such file"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_leaderboard_leaves_out_what_is_no_record_and_says_why(make, reason, records):
    pytest.importorskip("scipy")
    script = records / "logbook.py"
    make(records)
    done = logbook("leaderboard", script=script)
    (line,) = (line for line in done.stderr.splitlines() if "not listed: " in line)
    assert line.startswith(f"logbook.py: {records / 'tiny' / C}: not listed: ") and reason in line
    assert titles(records) == ["A", "B \\| b"]
    assert "not listed" in logbook("leaderboard", "--check", script=script).stderr  # the table is what it would write


def test_leaderboard_lists_a_record_from_another_machine_that_has_the_last_ones_runs_on_it(records):
    pytest.importorskip("scipy")
    script, folder = records / "logbook.py", records / "tiny" / C
    other_hardware(records)
    again = experiment(folder / "before", [1.42, 1.4205], SOURCES["b"], 7500)
    for path in again:
        path.write_bytes(path.read_bytes().replace(b"hardware: AMD EPYC, 2 cores", b"hardware: a faster machine"))
    logbook("leaderboard", script=script)
    assert titles(records) == ["A", "B \\| b", "C"]
    assert "| 1.4113 ± 0.0015 | 3 | 7.01 s |" in (records / "README.md").read_text(encoding="utf-8")
    for path in again:
        path.write_bytes(re.sub(rb"train_time:75\d\dms", b"train_time:6000ms", path.read_bytes()))
    assert "7.01 s, not less than 6.00 s" in logbook("leaderboard", script=script).stderr
    # Where they have been made again, that it is faster must be beyond chance.
    for path, ms in zip(again, (b"7016", b"7500")):
        path.write_bytes(path.read_bytes().replace(b"train_time:6000ms", b"train_time:%sms" % ms))
    assert "is not shown to be faster than the record before it, 2026-06-02_b: p = 0." in logbook(
        "leaderboard", script=script
    ).stderr


def test_leaderboard_lists_a_tracks_first_record_unchecked_if_that_says_why(records):
    pytest.importorskip("scipy")
    write(records / "tiny" / "2026-05_a" / "README.md", "# A\n\nChecked: no, the baseline\n")
    logbook("leaderboard", script=records / "logbook.py")
    assert titles(records) == ["A", "B \\| b"]
    assert "| no: the baseline |" in (records / "README.md").read_text(encoding="utf-8")


def test_leaderboard_needs_a_name_with_a_date_and_a_table(records):
    pytest.importorskip("scipy")
    script, before = records / "logbook.py", (records / "README.md").read_bytes()
    write(records / "unknown" / "2026-05-01_c" / "README.md", "# C\n")
    assert "no table for it" in mistake("leaderboard", script=script)
    assert (records / "README.md").read_bytes() == before
    shutil.rmtree(records / "unknown")
    (records / "tiny" / "2026-05_a").rename(records / "tiny" / "a")
    assert "a: not listed: a record's folder is named <date>_<name>" in logbook("leaderboard", script=script).stderr
    assert titles(records) == ["B \\| b"]


def test_the_tables_of_this_repository_are_up_to_date():
    pytest.importorskip("scipy")
    logbook("leaderboard", "--check")


def test_progress_is_record_time_by_date(records):
    pytest.importorskip("scipy")
    pytest.importorskip("matplotlib")
    script, picture = records / "logbook.py", records / "progress.svg"
    steps = json.loads(logbook("progress", "tiny", "--json", "--out", picture, script=script).stdout)
    assert steps == [
        {"number": 1, "day": "2026-05-01", "seconds": pytest.approx(9.014), "title": "A"},
        {"number": 2, "day": "2026-06-02", "seconds": pytest.approx(8.014), "title": "B | b"},
    ]
    axes = ">Record, from 2026-05-01 to 2026-06-02<", ">Training time to 1.44 nats per token (s)<"
    for words in (*axes, ">9.01<", ">8.01<"):
        assert words in picture.read_text(encoding="utf-8"), words
    assert re.search(r"^2 +2026-06-02 +8\.0 s +1\.12 +B \| b$", logbook("progress", "tiny", script=script).stdout, re.M)
    assert mistake("progress", "8xh100", script=script) == "logbook.py: 8xh100: has no records yet"
    assert "there are tiny, 8xh100, public" in mistake("progress", "fast", script=script)


def test_progress_of_the_public_leaderboard_is_its_table(tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "progress.png"
    steps = json.loads(logbook("progress", "public", "--json", "--out", picture).stdout)
    assert [step["number"] for step in steps] == list(range(1, 90))
    assert (steps[0]["day"], steps[0]["seconds"]) == ("2024-05-28", 2700)  # 45 minutes
    assert (steps[-1]["day"], steps[-1]["seconds"]) == ("2026-07-17", 73.8)  # 1.23 minutes
    assert picture.read_bytes().startswith(b"\x89PNG")


# ----------------------------------------------------------------------------------------------------------------------
# The command line, and files that are no logs
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["shwo", "a.txt"],
        ["show"],
        ["show", "missing.txt"],
        ["show", "--json", "--markdown", "a.txt"],
        ["stats", "--target", "low", "a.txt"],
        ["stats", "--target", "-1", "a.txt"],
        ["compare", "a.txt"],
        ["plot", "--out", "a.png"],
        ["plot", "--group", "name", "--out", "a.png"],
        ["extract", "missing.txt", "--out", "a.py"],
        ["diff", "missing.txt", "missing.txt"],
        ["progress", "nowhere"],
        ["progress", "public", "--out", "a.doc"],
    ],
)
def test_a_mistake_in_the_command_is_answered_in_one_line(args):
    if args[:1] == ["plot"]:
        pytest.importorskip("matplotlib")
    assert mistake(*args).startswith("logbook.py: ")


MEASURE = """
import resource, subprocess, sys
done = subprocess.run(sys.argv[1:], capture_output=True, text=True)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(done.returncode, used.ru_maxrss * (1 if sys.platform == "darwin" else 1024), used.ru_utime + used.ru_stime)
print(done.stderr[-2000:])
"""


def measured(*args, status):
    """Runs a command that must take little memory and time; a process between keeps this one's size out of it."""
    pytest.importorskip("resource")
    command = [sys.executable, "-c", MEASURE, sys.executable, LOGBOOK, *args]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "Traceback" not in out, out
    code, memory, seconds = out.splitlines()[0].split()
    assert int(code) == status, out
    assert int(memory) < 200e6, f"{int(memory) / 1e6:.0f} MB"
    assert float(seconds) < 15, f"{seconds} s"


def big(path, piece, start=b""):
    """A file of 100 MB: `start`, and then `piece` again and again."""
    with open(path, "wb") as file:
        file.write(start)
        for _ in range(100_000_000 // len(piece)):
            file.write(piece)
    return path


def test_random_bytes_are_no_log(tmp_path):
    rng = random.Random(0)
    path = write(tmp_path / "a.txt", b"".join(rng.randbytes(rng.randrange(300)) + b"\n" for _ in range(10_000)))
    for command in (
        ["show"],
        ["stats"],
        ["plot", "--out", tmp_path / "a.png"],
        ["extract", "--out", tmp_path / "a.py"],
    ):
        measured(*command, path, status=2)


def test_a_log_with_random_bytes_in_its_lines_is_read_around_them(tmp_path):
    rng = random.Random(1)
    log = our_log(lines="".join(val(step, 2000, 4.5, 50 * step) for step in range(2001))).splitlines(keepends=True)
    for _ in range(500):
        line = bytearray(log[index := rng.randrange(1, len(log))])
        line[rng.randrange(len(line))] = rng.randrange(256)
        log[index] = bytes(line)
    done = logbook("show", write(tmp_path / "a.txt", b"".join(log)), status=2)
    assert "cannot read" in done.stderr and "/2000" in done.stdout


def test_a_log_of_100_megabytes_is_read_in_seconds_and_little_memory(tmp_path):
    steps = b"".join(train(step, 200_000, 3.8876, 57 * step).encode() for step in range(1, 16_000))
    path = big(tmp_path / "a.txt", steps + os.urandom(40_000), start=our_log())
    measured("show", path, status=0)


@pytest.mark.parametrize(
    "piece",
    [b"x" * 1_000_000, b"step:1/2 val_loss:3" * 50_000, b"\n" * 1_000_000],
    ids=["one line", "one line like a log's", "empty lines"],
)
def test_100_megabytes_without_a_line_of_a_log_are_no_log(tmp_path, piece):
    measured("show", big(tmp_path / "a.txt", piece), status=2)


def test_claims_of_a_source_cost_no_more_than_reading(tmp_path):
    piece = "".join(f"{RULE}\nsource: 4000000 bytes, sha256 {i:064}\n" for i in range(10_000)).encode()
    measured("show", big(tmp_path / "a.txt", piece), status=2)
