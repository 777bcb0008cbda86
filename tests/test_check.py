"""`logbook.py check`: the script of this repository passes, and every kind of cheat is caught by its own check.

A cheat is a copy of train_gpt.py, with the recipe's tables, in which short snippets are replaced.
Most are judged by records/legality.py, which `check` starts, in processes forked from one that has
imported PyTorch already.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import legality
import logbook as program
import recipe
from test_command_line import LOGBOOK, ROOT, SCRIPT, command, data, launcher, only_log, small  # noqa: F401 (fixtures)
from test_logbook import header, logbook, mistake, write

LEGALITY = ROOT / "records" / "legality.py"


TABLES = re.compile(r"^RECORD_LAYERS = \(\n.*?^PRESETS = {\n.*?^}\n", re.MULTILINE | re.DOTALL)


def edited(path, *edits):
    """A copy of train_gpt.py with the tables of recipe.py, and with each (old, new) replaced.

    Every old one must be there just once.
    """
    (tables,) = TABLES.findall(Path(recipe.__file__).read_text())
    text, count = TABLES.subn(lambda _: tables, SCRIPT.read_text())
    assert count == 1
    for old, new in edits:
        assert text.count(old) == 1, f"{text.count(old)} times in train_gpt.py: {old}"
        text = text.replace(old, new)
    return write(path, text)


@pytest.fixture
def judge(launcher, tmp_path):  # noqa: F811
    """What legality.py says of several scripts at once: by name, what it says of loading, and findings by check."""

    def judge(scripts, *checks):
        started = {name: launcher.start(LEGALITY, path, *checks, cwd=tmp_path) for name, path in scripts.items()}
        said = {}
        for name, running in started.items():
            result = running.wait(300)
            assert result.returncode == 0, result.stderr
            first, loading, *answers = map(json.loads, result.stdout.splitlines())
            assert first == {"started": True}
            said[name] = loading, {answer["check"]: answer["findings"] for answer in answers}
        return said

    return judge


@pytest.fixture
def caught(judge, tmp_path):
    """What a check finds in cheats, each a tuple of edits: (cheat, all findings in one text)."""

    def caught(check, cheats):
        scripts = {name: edited(tmp_path / f"cheat_{i}.py", *edits) for i, (name, edits) in enumerate(cheats.items())}
        for name, (loading, findings) in judge(scripts, check).items():
            assert loading == {"loaded": True}, (name, loading)
            assert findings[check], f"{check} did not find {name}"
            yield name, "\n".join(findings[check])

    return caught


# ----------------------------------------------------------------------------------------------------------------------
# Cheats
# ----------------------------------------------------------------------------------------------------------------------

AHEAD = ("(back >= 0)", "(back >= -1)")


def test_later_token_that_changes_an_earlier_loss_is_caught(caught):
    embedding = "x = F.embedding(inputs, self.embed)"
    cheats = {
        "attention that sees one token ahead": [AHEAD],
        "smear that leaks": [("[:, None] * previous(x, begins)", "[:, None] * x.roll(-1, 0)")],
        "key offset that leaks": [("previous(still, begins)", "still.roll(-1, 0)")],
        "multi-token inputs": [(embedding, f"{embedding} + 0.01 * F.embedding(inputs.roll(-3), self.embed)")],
    }
    ahead = {"multi-token inputs": 3}
    for cheat, findings in caught("causal", cheats):
        found = re.match(r"record: changing token (\d+) changes the loss of position (\d+) by ", findings)
        token, position = map(int, found.groups())
        assert position == token - ahead.get(cheat, 1), (cheat, findings)


def test_later_token_that_changes_an_earlier_loss_in_training_alone_is_caught(caught):
    forward = "    def forward(self, inputs: Tensor, targets: Tensor, context: Context) -> Tensor:\n"
    leak = "    def forward(self, inputs, targets, context):\n"
    leak += "        return self.honest(inputs.roll(-1), targets, context)\n\n"
    ((_, findings),) = caught("causal", {"leak": [(forward, leak + forward.replace("forward", "honest"))]})
    assert all(line.startswith("record: in training, changing the tokens after") for line in findings.splitlines())


def test_probabilities_that_do_not_sum_to_1_are_caught(caught):
    lse = "weights.sum() * z.logsumexp(-1)"
    chunk = "token_losses(rows, self.lm_head, row_targets, weight, torch.float32)"
    stream = "self.stream(inputs, context)\n        weight"
    cheats = {
        "a head without the normalizer": [(lse, "weights.sum() * 20")],
        "a softmax over a part of the vocabulary": [(lse, "weights.sum() * z[:, 1:].logsumexp(-1)")],
        "losses that are cut": [(chunk, f"{chunk}.clamp(max=6)")],
        "a model that is told some targets": [
            (stream, stream.replace("inputs,", "torch.where(targets % 7 > 0, inputs, targets),"))
        ],
    }
    for cheat, findings in caught("normalized", cheats):
        sums = re.findall(r"the probabilities of position (\d+) sum to (\S+)", findings)
        assert sums[0][0] == "0" and max(abs(float(total) - 1) for _, total in sums) > 0.001, (cheat, findings)


def test_token_that_reaches_another_document_is_caught(caught):
    same = "docs_of_queries[:, :, None] == docs"
    docs, embedding = "(inputs == config.bos_id).cumsum(0)", "x = F.embedding(inputs, self.embed)"
    cheats = {
        "a mask that lets neighbours mix": [(same, same.replace("==", "- 1 <="))],
        "one token back across the boundary": [("(inputs == config.bos_id) |", "(inputs == -1) |")],
        "a count of all documents": [(embedding, f"{embedding} + 0.01 * {docs}[:, None]")],
    }
    for cheat, findings in caught("documents", cheats):
        words = (
            r"record: changing document (\d+) \(tokens .*\) changes the loss of position \d+, in document (\d+), by "
        )
        found = re.match(words, findings)
        document, other = map(int, found.groups())
        assert other == document + 1 if "neighbours" in cheat or "back" in cheat else other > document, findings


def test_validation_on_another_stream_or_with_another_count_is_caught(caught):
    read = "tokens, _ = read_shard(path, settings.model)"
    skip = """tokens, bounds = read_shard(path, settings.model)
            longest = np.diff(bounds).argmax()
            tokens = np.delete(tokens, slice(*bounds[longest : longest + 2]))"""
    cheats = {
        "a loader that skips a document": [(read, skip)],
        "a loader that counts fewer tokens": [("in sequences[world.rank", "in sequences[1:][world.rank")],
        "a sum that is divided by more": [("(sequences.size(1) - 1)", "sequences.size(1)")],
        "a shorter stream": [("setting(10_485_760", "setting(1_048_576")],
    }
    words = dict(
        zip(cheats, [" of the first validation is ", " tokens had 6,144 ", "mean loss of its tokens is", "val_tokens"])
    )
    for cheat, findings in caught("validation", cheats):
        assert words[cheat] in findings, (cheat, findings)


def test_loss_that_depends_on_the_world_size_is_caught(caught):
    cheats = {
        "ranks that share slices": [("range(world.rank * own, (world.rank + 1) * own)", "range(own)")],
        "losses that are not shared out": [("total / (slices * ", "total / (len(tokens) * ")],
    }
    for cheat, findings in caught("world_size", cheats):
        assert re.match(r"train_loss of step \d is \d+\.\d+ on one process, \d+\.\d+ on 2", findings), (cheat, findings)


def test_warm_up_that_leaves_a_trace_is_caught(caught):
    traces = {
        "model.lm_head.data[0, 0] *= 1.0001": r"GPT\.lm_head",
        "optimizer.state['qk_bank']['exp_avg'][0] = 1": r"Optimizer\.state\.qk_bank\.exp_avg",
        "optimizer.updates += 1": r"Optimizer\.updates",
        "model.embed.grad = torch.zeros_like(model.embed)": r"GPT\.embed\.grad",
        "torch.rand(1)": r"torch\.get_rng_state\(\)",
    }
    end = 'if __name__ == "__main__":'
    dishonest = "def warm_up(settings, model, objective, optimizer, world):\n"
    dishonest += "    honest_warm_up(settings, model, objective, optimizer, world)\n    {}\n\n\n" + end
    cheats = {trace: [("def warm_up(", "def honest_warm_up("), (end, dishonest.format(trace))] for trace in traces}
    for trace, findings in caught("warm_up", cheats):
        assert re.fullmatch(traces[trace] + " is not what it was", findings), (trace, findings)


def test_compiler_flags_are_caught_at_import_in_a_run_and_in_what_only_a_gpu_runs(caught, tmp_path):
    """Set for good or for a moment, in plain words or not; each is named with its line where there is one."""
    edits = {
        "compile(copy, dynamic=False)": "compile(copy, dynamic=False, mode='max-autotune')",
        "E4M3_MAX = 448": "E4M3_MAX = 448\ntorch._inductor.config.max_fusion_size = 128",
        "for adam in (False, True, True):": (
            "with vars(torch)['_in' 'ductor'].config.patch(shape_padding=False): pass\n"
            "        for adam in (False, True, True):"
        ),
        "gc.collect()": "os.environ['TORCHINDUCTOR' '_MAX_AUTOTUNE'] = '1'\n        gc.collect()",
        "def mark(device": ("def only_on_cuda():\n    torch._dynamo.config.recompile_limit = 64\n\n\ndef mark(device"),
    }
    ((_, findings),) = caught("compiler", {"flags": edits.items()})
    lines = (tmp_path / "cheat_0.py").read_text().splitlines()

    def line(words):
        (number,) = (number for number, text in enumerate(lines, 1) if words in text)
        return f"line {number}: "

    assert sorted(findings.splitlines()) == sorted(
        [
            line("mode='max-autotune'") + "torch.compile(mode='max-autotune')",
            line("max_fusion_size") + "torch._inductor.config.max_fusion_size = 128",
            line("shape_padding") + "torch._inductor.config.shape_padding = False",
            "TORCHINDUCTOR_MAX_AUTOTUNE = '1'",
            line("recompile_limit = 64") + "torch._dynamo.config.recompile_limit",
        ]
    )


# ----------------------------------------------------------------------------------------------------------------------
# The command
# ----------------------------------------------------------------------------------------------------------------------


def test_script_of_this_repository_passes():
    rows = json.loads(logbook("check", SCRIPT, "--json").stdout)
    assert [(row["check"], row["ok"], row["findings"]) for row in rows] == [(name, True, []) for name in program.CHECKS]


def test_cheat_fails_its_own_check_alone_with_status_1(tmp_path):
    lines = logbook("check", edited(tmp_path / "cheat.py", AHEAD), status=1).stdout.splitlines()
    assert [line.split()[:2] for line in lines] == [
        [name, "FAILED" if name == "causal" else "ok"] for name in program.CHECKS
    ]
    assert re.search("changing token 1 changes the loss of position 0 by", lines[0])


def test_log_is_checked_by_its_script_and_its_settings_and_the_script_runs_again(small, launcher, tmp_path):  # noqa: F811
    assert small("--steps", "4").returncode == 0
    log, script = only_log(tmp_path), tmp_path / "again.py"
    logbook("extract", log, "--out", script)
    assert script.read_bytes() == SCRIPT.read_bytes()
    again = launcher.start(script, "--preset", "tiny", "--dry-run", cwd=tmp_path).wait()
    assert again.returncode == 0 and "training tokens" in again.stdout, again.stderr

    table = logbook("check", log, "--only", "compiler", "validation", "--markdown", status=1).stdout.splitlines()
    assert len(table) == 4 and table[3].startswith("| compiler | ok | ")
    assert table[2].startswith(
        "| validation | FAILED | the log's run validated on 2048 tokens of x_val_*.bin, not 524288 "
    )


@pytest.mark.parametrize("change, right", [({}, True), ({"val_tokens": 10**6}, False), ({"val_files": "x.bin"}, False)])
def test_settings_of_a_log_must_name_the_whole_stream(change, right, tmp_path):
    source = b"print(1)\n"
    settings = {"preset": "record", "val_tokens": 10_485_760, "val_files": "elsewhere/fineweb_val_*.bin"} | change
    log = header(source).replace(b'{"preset": "tiny", "seed": 1}', json.dumps(settings).encode())
    (tmp_path / "out").mkdir()
    script, notes = program.find_checked(str(write(tmp_path / "a.txt", source + log)), tmp_path / "out")
    assert script.read_bytes() == source
    assert (notes == []) == right


def test_script_that_cannot_be_checked_is_answered_with_the_reason(judge, tmp_path):
    first = "import argparse\n"
    line = SCRIPT.read_text().partition(first)[0].count("\n") + 2
    edits = {
        f"line {line}: invalid syntax": (first, first + "def\n"),
        "ends while it is imported, with status 3": (first, first + "raise SystemExit(3)\n"),
        f"cannot be imported: ZeroDivisionError: division by zero (line {line})": (first, first + "1 / 0\n"),
        "lacks GPT.evaluate, warm_up (records/README.md lists what a script must keep)": (
            'if __name__ == "__main__":', "del warm_up, GPT.evaluate\nif __name__ == '__main__':",
        ),
    }  # fmt: skip
    scripts = {problem: edited(tmp_path / f"{i}.py", edit) for i, (problem, edit) in enumerate(edits.items())}
    for problem, (loading, findings) in judge(scripts, "causal").items():
        assert loading == {"problem": problem} and not findings


def test_what_is_no_script_is_a_mistake(tmp_path):
    assert "No such file" in mistake("check", tmp_path / "missing.py")
    assert "holds no script" in mistake("check", write(tmp_path / "a.txt", "step:1/1 val_loss:3.2\n"))
    assert "is empty" in mistake("check", write(tmp_path / "empty.py", ""))
    assert "invalid choice: 'casual'" in mistake("check", SCRIPT, "--only", "casual")
    assert "'-1' is not a time" in mistake("check", SCRIPT, "--timeout", "-1")


@pytest.fixture
def hanging(tmp_path):
    """A script that writes down its process and hangs, and whether that process is still there."""
    written = tmp_path / "process"

    def is_there():
        try:
            os.kill(int(written.read_text()), 0)
            return True
        except (FileNotFoundError, ValueError, ProcessLookupError):
            return False

    text = f"import os, time\nopen({str(written)!r}, 'w').write(str(os.getpid()))\ntime.sleep(1000)\n"
    return write(tmp_path / "hangs.py", text), is_there, written


def test_script_that_hangs_is_ended_and_a_mistake_in_one_line(hanging):
    script, is_there, written = hanging
    assert mistake("check", script, "--timeout", "3") == f"logbook.py: {script}: importing it: not done after 3 s"
    assert written.exists() and not is_there()


def test_script_ends_with_a_check_that_is_ended(hanging):
    script, is_there, _ = hanging
    running = subprocess.Popen([sys.executable, LOGBOOK, "check", script])
    while not is_there():
        assert running.poll() is None
        time.sleep(0.05)
    running.terminate()
    assert running.wait(30) == 128 + signal.SIGTERM
    assert not is_there()


def test_script_that_ends_the_process_fails_the_check_and_those_after_it_are_not_reached(tmp_path):
    evaluate = "    def evaluate(self, inputs: Tensor, targets: Tensor, context: Context) -> Tensor:\n"
    script = edited(tmp_path / "exits.py", (evaluate, evaluate + "        os._exit(5)\n"))
    done = logbook("check", script, "--only", "documents", "causal", "--json", status=1)
    assert [(row["check"], row["findings"]) for row in json.loads(done.stdout)] == [
        ("causal", ["the process ended, with status 5"]),
        ("documents", ["not reached"]),
    ]


def test_names_that_a_script_must_keep_are_those_in_the_readme_and_those_that_are_used():
    text = (ROOT / "records" / "README.md").read_text()
    section = text.partition("a script must keep")[2].partition("\n#")[0]
    assert tuple(re.findall(r"^\| `([\w.]+)[`(]", section, re.MULTILINE)) == legality.NAMES
    used = set(re.findall(r"\bscript\.([A-Za-z_]\w*)", LEGALITY.read_text()))
    assert used == {name for name in legality.NAMES if "." not in name} | {"GPT"}


def test_checks_of_the_command_are_those_that_exist():
    assert tuple(legality.CHECKS) == program.CHECKS
