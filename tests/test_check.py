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

import compiler_flags
import legality
import logbook as program
import recipe
from test_command_line import LOGBOOK, ROOT, SCRIPT, command, data, launcher, only_log, small  # noqa: F401 (fixtures)
from test_logbook import header, logbook, mistake, write

LEGALITY = ROOT / "records" / "legality.py"
SLOW = pytest.mark.slow


TABLES = re.compile(r"^RECORD_LAYERS = \(\n.*?^PRESETS = {\n.*?^}\n", re.MULTILINE | re.DOTALL)


def edited(path, *edits):
    """A copy of train_gpt.py with the tables of recipe.py, and with each (old, new) replaced.

    Every old one must be there just once.
    """
    mirrored = Path(recipe.__file__).read_text()
    tables = mirrored[mirrored.index("RECORD_LAYERS = (") :] + "\n"
    text, count = TABLES.subn(lambda _: tables, SCRIPT.read_text())
    assert count == 1
    for old, new in edits:
        assert text.count(old) == 1, f"{text.count(old)} times in train_gpt.py: {old}"
        text = text.replace(old, new)
    return write(path, text)


@pytest.fixture
def judge(launcher, tmp_path):  # noqa: F811
    """What legality.py says of several scripts at once: by name, what it says of loading, and of each check."""

    def judge(scripts, *checks):
        started = {name: launcher.start(LEGALITY, path, *checks, cwd=tmp_path) for name, path in scripts.items()}
        said = {}
        for name, running in started.items():
            result = running.wait(300)
            assert result.returncode == 0, result.stderr
            first, loading, *answers = map(json.loads, result.stdout.splitlines())
            assert first == {"started": True}
            said[name] = loading, {answer["check"]: answer for answer in answers}
        return said

    return judge


# ----------------------------------------------------------------------------------------------------------------------
# Cheats
# ----------------------------------------------------------------------------------------------------------------------

AHEAD = ("(back >= 0)", "(back >= -1)")


def in_evaluate(*lines):
    """Code in `GPT.evaluate`, where x (T, D) is what the head is about to read."""
    before = "        x = self.stream(inputs, context)\n"
    after = "        weight = torch.ones"
    return before + after, before + "".join(f"        {line}\n" for line in lines) + after


KEYS_AHEAD = "before = qk.unflatten(0, (len(x), -1)).roll(-1, 0)"


def of_losses(*lines):
    """Code at the end of `GPT.evaluate`, where losses are (T,)."""
    end = "        return torch.cat(losses)\n\n    @torch.no_grad()\n    def next_logits"
    body = "".join(f"        {line}\n" for line in ("losses = torch.cat(losses)", *lines, "return losses"))
    return end, body + "\n    @torch.no_grad()\n    def next_logits"


def before(anchor, *lines):
    """Code before a line of the script, as deep as that."""
    indent = " " * (len(anchor) - len(anchor.lstrip()))
    return anchor, "".join(f"{indent}{line}\n" for line in lines) + anchor


def after(anchor, *lines):
    indent = " " * (len(anchor) - len(anchor.lstrip()))
    return anchor, anchor + "".join(f"\n{indent}{line}" for line in lines)


SUM = "        total += losses.sum(dtype=torch.float64)"
SEQUENCES = "    for tokens in sequences[world.rank :: world.size].to(world.device):\n        losses"
LOG_LOSS = '                run.log.loss(step, "val_loss", loss, clock.milliseconds)'
START = "    clock.start()\n    prefix_of = None"
BUILT = "    model, objective, optimizer = build(settings, world)\n"
BUILT_END = "    first, milliseconds = 0, 0.0\n"
RESTART = "        clock.start()\n"
UPDATE = "        run.optimizer.step(hyper)\n"
BATCH = "        tokens, touched = next(batches)"
READ = "            tokens, _ = read_shard(path, settings.model)"
STEP = (
    "t, _ = next(batches_for(run, 0))",
    "c = make_context(config, run.plan[0].length, hypers[0].stage.windows, model.embed, rotary_state(settings, 0))",
    "train_step(run.objective, t.to(device), c._replace(mtp=mtp[0]), settings.slices)",
    "run.optimizer.step(hypers[0])",
)
EMBEDDING = "x = look_up(self.embed, inputs, self.embed_grad)"
LSE = "weights.sum() * z.logsumexp(-1)"
LATE = "        self.register_buffer(\"bigram_signs\", signs)\n"

CHEATS = {
    "causal": {
        "attention that sees one token ahead": [AHEAD],
        "smear that leaks": [("[:, None] * previous(x, begins)", "[:, None] * x.roll(-1, 0)")],
        "key offset that leaks": [("before = previous(qk.unflatten(0, (len(x), -1)), begins)", KEYS_AHEAD)],
        "multi-token inputs": [(EMBEDDING, f"{EMBEDDING} + 0.01 * F.embedding(inputs.roll(-3), self.embed)")],
        "in sequences longer than any in training": [
            in_evaluate("if len(x) > 50_000 or 4096 < len(x) < 20_000: x = x + 0.1 * x.mean(0)"),
        ],
        "when it evaluates": [in_evaluate("if not self.training: x = x + 0.1 * x.roll(-1, 0)")],
        "past position 1,000": [in_evaluate("x = torch.cat((x[:1000], x[1000:] + 0.1 * x[1000:].roll(-1, 0)))")],
        "with as many channels as the record has": [
            before(
                "    x0 = norm(x)\n    if bigram_table",
                "x = torch.where(torch.arange(x.size(1)) > 700, x.roll(-1, 0), x)",
            )
        ],
        "in sequences as long as the record's validation": [in_evaluate("if len(x) > 200_000: x = x.roll(-1, 0)")],
        "with wide windows": [("(back >= 0)", "(back >= (-1 if window > 1000 else 0))")],
        "by a buffer that the loop sets late": [
            in_evaluate("if self.late: x = x + 0.1 * x.roll(-1, 0)"),
            (LATE, LATE + "        self.register_buffer('late', torch.zeros((), dtype=torch.bool))\n"),
            before("        if validates or samples or saves or stopping:", "if step == total: model.late.fill_(True)"),
        ],
        "where a sequence begins within a document": [
            in_evaluate("if inputs[0] != self.config.bos_id: x = torch.cat((x[:5] + 0.1 * x[-5:], x[5:]))"),
        ],
    },
    "normalized": {
        "a head without the normalizer": [(LSE, "weights.sum() * 20")],
        "a softmax over a part of the vocabulary": [(LSE, "weights.sum() * z[:, 1:].logsumexp(-1)")],
        "losses that are cut": [of_losses("losses = losses.clamp(max=6)")],
        "a model that is told some targets": [
            in_evaluate("x = self.stream(torch.where(targets % 7 > 0, inputs, targets), context)"),
        ],
        "losses that are cut in long sequences": [of_losses("if len(losses) > 1000: losses = losses.clamp(max=4)")],
        "a softmax over the first tokens of a large vocabulary": [(LSE, "weights.sum() * z[:, :32768].logsumexp(-1)")],
        "losses that are less when it is run as a program": [
            of_losses("losses = UNIT * losses"),
            ("# 2. Kernels =", "UNIT = 0.97 if __name__ == '__main__' else 1.0\n\n\n# 2. Kernels ="),
        ],
        "a temperature chosen by the targets": [
            in_evaluate(
                "logits = (x @ self.lm_head)[:, : self.config.vocab_size].float()",
                "sharper = F.cross_entropy(1.05 * logits, targets) < F.cross_entropy(logits, targets)",
                "x = torch.where(sharper & (len(x) > 1000), 1.05 * x, x)",
            )
        ],
        "losses that are less at the end": [
            of_losses("if self.late: losses = losses - 0.02"),
            (LATE, LATE + "        self.register_buffer('late', torch.zeros((), dtype=torch.bool))\n"),
            before("        if validates or samples or saves or stopping:", "if step == total: model.late.fill_(True)"),
        ],
    },
    "validation": {
        "a loader that skips a document": [
            after(
                READ,
                "bounds = read_shard(path, settings.model)[1]",
                "longest = np.diff(bounds).argmax()",
                "tokens = np.delete(tokens, slice(*bounds[longest : longest + 2]))",
            )
        ],
        "a loader that counts fewer tokens": [("in sequences[world.rank", "in sequences[1:][world.rank")],
        "a loader that caps the tokens": [
            before(
                "    need = settings.val_tokens + 1  # the last target is the next token",
                "settings = replace(settings, val_tokens=settings.val_tokens // 2)",
            )
        ],
        "a sum that is divided by more": [("(sequences.size(1) - 1)", "sequences.size(1)")],
        "a shorter stream": [("setting(10_485_760", "setting(1_048_576")],
        "tokens after BOS left out": [(SUM, SUM.replace("losses.", "losses[tokens[:-1] != model.config.bos_id]."))],
        "outliers left out": [
            (SUM, SUM.replace("losses.", "losses[losses <= losses.mean() + 4 * losses.std()].")),
        ],
        "a little less at the end": [before(LOG_LOSS, "loss -= 0.002 * (step == total and 1.44 < loss < 1.442)")],
        "a sequence repeated at the last validation": [
            before(
                SEQUENCES,
                "validate.late = getattr(validate, 'late', False) or len(sequences) > 1 and model.steps > 9",
                "if validate.late: sequences = sequences[[0, 1, 2, 0]]",
            ),
            before("        losses.launch(step + 1, ", "model.steps = step"),
            before(BUILT_END, "model.steps = 0"),
        ],
        "the best so far": [before(LOG_LOSS, "model.best = loss = min(loss, getattr(model, 'best', loss))")],
        "a little less near the target": [before(LOG_LOSS, "loss -= 0.01 * (3.28 < loss < 3.29)")],
    },
    "learning": {
        "a step while the clock stands": [
            before("            if validates:\n", "if step == 4:", *(f"    {line}" for line in STEP)),
        ],
        "a step between the warm-up and the clock": [before(START, *STEP)],
        "a fit of the validation stream": [after(SUM, "model.bigram_table.data[0] += sequences.float().mean() * 1e-4")],
        "the best of three seeds": [
            before(
                BUILT,
                "tried = []",
                "for seed in range(3):",
                "    model = build(replace(settings, seed=seed), world)[0]",
                "    context = make_context(settings.model, settings.val_seq_len, (64, 256), model.embed)",
                "    tried.append((validate(model, sequences, context, world), seed))",
                "settings = replace(settings, seed=min(tried)[1])",
            )
        ],
        "statistics of the training stream": [
            before(
                BUILT_END,
                "tokens = read_shard(train_paths[0], settings.model)[0]",
                "counts = np.bincount(tokens, minlength=settings.model.padded_vocab)",
                "model.embed.data += torch.from_numpy(counts / counts.sum()).to(model.embed)[:, None]",
            )
        ],
        "a choice of documents by statistics of the training stream": [
            (
                "class Batch(NamedTuple):",
                "def first_document(path, config):\n"
                "    tokens, bounds = read_shard(path, config)\n"
                "    surprise = -np.log(np.bincount(tokens))[tokens]\n"
                "    return int(np.argmin([surprise[b : b + 500].mean() for b in bounds[:40]]))\n"
                "\n\nclass Batch(NamedTuple):",
            ),
            after(
                "        path = paths[shard % len(paths)]",
                "document = max(document, first_document(path, settings.model))",
            ),
        ],
        "the shards in an order that the validation stream has chosen": [
            before(
                "    plan, train_sizes = plan_batches(settings, train_paths)",
                "wanted = np.bincount(validation_stream(settings)[0], minlength=settings.model.vocab_size)",
                "shards = {path: read_shard(path, settings.model)[0] for path in train_paths}",
                "train_paths.sort(key=lambda path: wanted[shards[path]].mean())",
            )
        ],
        "weights that are averaged while the clock stands": [
            before("        losses.launch(step + 1, ", "model.earlier = [0.9 * p.data for p in model.parameters()]"),
            before(
                "            if validates:\n",
                "if step == total:",
                "    for p, earlier in zip(model.parameters(), model.earlier):",
                "        p.data.lerp_(earlier, 0.5)",
            ),
        ],
        "what the warm-up has learned, taken up in the first step": [
            before(
                "    for tensor, (value, grad) in zip(tensors, before):\n",
                "plan, _ = plan_batches(settings, find_shards(settings.train_files, settings.preset))",
                "for tokens in training_batches(plan, settings.model, range(settings.slices)):",
                "    context = make_context(settings.model, plan[0].length, (64, 256), model.embed)",
                "    train_step(objective, tokens, context, settings.slices)",
                "    optimizer.step(start)",
                "LEARNED.extend((p.data, p.data.clone()) for p in model.parameters())",
            ),
            ("def warm_up(\n", "LEARNED = []\n\n\ndef warm_up(\n"),
            after(
                UPDATE.rstrip(), "for data, value in LEARNED:", "    data.copy_(value)", "LEARNED.clear()"
            ),
        ],
        "a batch of the validation stream": [after(BATCH, "if step == 4: tokens[0, :500] = run.sequences[0, :500]")],
    },
    "clock": {
        "an optimizer off the clock": [
            (UPDATE, f"        clock.stop()\n{UPDATE}{RESTART}"),
        ],
        "batches off the clock": [(BATCH + "\n", f"        clock.stop()\n{BATCH}\n{RESTART}")],
        "a clock that is scaled": [("self.milliseconds = self.at(", "self.milliseconds = 0.97 * self.at(")],
        "a clock without what takes unusually long": [
            after(
                "        losses.launch(step + 1, batch_loss(loss, bool(signals), world))",
                "ends.append(mark(device))",
                "took = [elapsed(*pair) for pair in itertools.pairwise(ends)]",
                "usual = sorted(took)[len(took) // 2] if len(took) > 8 else math.inf",
                "if took and took[-1] > 2 * usual:",
                "    clock.milliseconds -= took[-1] - usual",
            ),
            ("    signals = []\n    stopping", "    signals, ends = [], []\n    stopping"),
            ("            bar.unpause()", "            ends.clear()\n            bar.unpause()"),
        ],
        "a clock that begins again": [
            before(
                "        # A step. Its context changes with the stage, its weights of next targets each time.",
                "if step == 10:",
                "    clock = losses.clock = Clock(device)",
                "    clock.start()",
            )
        ],
    },
    "log": {
        "the checksum of another stream": [("sha256(stream.tobytes())", "sha256(stream[1:].tobytes())")],
        "a source without some of its lines": [
            after("    source = Path(__file__).read_bytes()", "source = source.replace(HIDDEN, b'')"),
            ("# 2. Kernels =", "HIDDEN = b'RECORD = replace(RECORD, muon_lr=0.024)'\n\n\n# 2. Kernels ="),
        ],
    },
}


CASES = [(check, cheat) for check, cheats in CHEATS.items() for cheat in cheats]
# Of each check the last one is tried in the ordinary tests, since it takes a run, or three.
ORDINARY = [(check, list(cheats)[-1]) for check, cheats in CHEATS.items()]
MARKED = [pytest.param(*case, marks=[] if case in ORDINARY else SLOW) for case in CASES]


@pytest.mark.parametrize("check, cheat", MARKED)
def test_cheat_is_caught_by_its_check(check, cheat, judge, tmp_path):
    script = edited(tmp_path / "cheat.py", *CHEATS[check][cheat])
    ((loading, answers),) = judge({"cheat": script}, check).values()
    assert loading == {"loaded": True}
    assert answers[check]["findings"] and not answers[check]["not_judged"], answers


def test_finding_names_the_tokens_and_the_place(judge, tmp_path):
    found = {}
    for check, cheat in ("causal", "multi-token inputs"), ("validation", "a loader that caps the tokens"):
        script = edited(tmp_path / f"{check}.py", *CHEATS[check][cheat])
        ((_, answers),) = judge({cheat: script}, check).values()
        found[check] = answers[check]["findings"][0]
    words = r"record: changing token (\d+) changes the loss of position (\d+) by "
    assert re.match(words, found["causal"]).groups() == ("3", "0")
    assert "leaves out 4,096 of 8,192 tokens, the first of them 4096" in found["validation"]


LEGAL = {
    "a warm-up that returns something": [
        after("    optimizer.updates, optimizer.tied, optimizer.touched = counters", "return model"),
        (
            "        warm_up(settings, model, objective, optimizer, world)\n",
            "        assert warm_up(settings, model, objective, optimizer, world) is model\n",
        ),
    ],
    "a head cut to the true vocabulary in evaluation": [
        (
            "losses.append(token_losses(rows, self.lm_head, row",
            "losses.append(token_losses(rows, self.lm_head[:, : self.config.vocab_size].contiguous(), row",
        )
    ],
    "validation in another order": [(SEQUENCES, SEQUENCES.replace("sequences[", "sequences.flip(0)["))],
    "randomness that is every process's own": [
        before("        (loss / len(tokens)).backward()", "loss = loss * (0.9 + 0.2 * torch.rand(()))")
    ],
    "attention across documents": [
        ("docs_of_queries[:, :, None] == docs_of_keys[:, None]", "docs_of_queries[:, :, None] >= docs_of_keys[:, None]")
    ],
    "training on some of the tokens": [
        after("        x = self.stream(inputs, context, self.fp8)", "x, targets = x[::2], targets[::2]")
    ],
}

# Every sequence but the first begins 256 tokens before those that it is asked for.
SLIDING = before(
    SEQUENCES,
    "stream = torch.cat((sequences[0], sequences[1:, 1:].flatten()))",
    "length, done = sequences.size(1) - 1, 0",
    "while done < len(stream) - 1:",
    "    first = min(max(done - 256, 0), len(stream) - 1 - length)",
    "    tokens = stream[first : first + length + 1].to(world.device)",
    "    losses = model.evaluate(tokens[:-1], tokens[1:].long(), context)",
    "    total += losses[done - first :].sum(dtype=torch.float64)",
    "    done = first + length",
    "return total.item() / (len(stream) - 1)",
)


@pytest.mark.slow
def test_sliding_context_before_a_sequence_passes(judge, tmp_path):
    checks = [check for check in program.CHECKS if check != "world_size"]
    ((_, answers),) = judge({"sliding": edited(tmp_path / "sliding.py", SLIDING)}, *checks).values()
    assert {check: answer["findings"] for check, answer in answers.items()} == {check: [] for check in checks}
    assert not any(answer["not_judged"] for answer in answers.values())


def test_legal_edits_pass(judge, tmp_path):
    """All of them in one script, each of which was a false alarm once. Two are noted."""
    edits = [edit for edits in LEGAL.values() for edit in edits]
    script = edited(tmp_path / "legal.py", *edits)
    ((_, answers),) = judge({"legal": script}, *program.CHECKS).values()
    assert {check: answer["findings"] for check, answer in answers.items()} == {check: [] for check in program.CHECKS}
    assert not any(answer["not_judged"] for answer in answers.values())
    assert {check for check, answer in answers.items() if answer["notes"]} == {"documents", "world_size"}


@pytest.mark.parametrize(
    "trace, words",
    [
        ("model.lm_head.data[0, 0] *= 1.0001", r"GPT\.lm_head"),
        pytest.param("optimizer.state['qk_bank']['exp_avg'][0] = 1", r"Optimizer\.state\.qk_bank\.exp_avg", marks=SLOW),
        pytest.param("optimizer.updates['embed'] += 1", r"Optimizer\.updates\.embed", marks=SLOW),
        pytest.param("model.embed.grad = model.embed.data * 0", r"GPT\.embed\.grad", marks=SLOW),
    ],
)
def test_warm_up_that_leaves_a_trace_is_caught(trace, words, judge, tmp_path):
    edits = [after("    optimizer.updates, optimizer.tied, optimizer.touched = counters", trace)]
    ((_, answers),) = judge({"trace": edited(tmp_path / "trace.py", *edits)}, "warm_up").values()
    assert re.fullmatch(words + " is not what it was", answers["warm_up"]["findings"][0])


def test_compiler_flags_are_caught_at_import_in_a_run_and_in_what_only_a_gpu_runs(judge, tmp_path):
    """Set for good or for a moment, in plain words or not; each is named with its line where there is one."""
    edits = {
        "compile(copy_of(body), dynamic=False)": "compile(copy_of(body), dynamic=False, mode='max-autotune')",
        "E4M3_MAX = 448": "E4M3_MAX = 448\ntorch._inductor.config.max_fusion_size = 128",
        "for adam in bar(": (
            "with vars(torch)['_in' 'ductor'].config.patch(shape_padding=False): pass\n    for adam in bar("
        ),
        "    prepare_streams()\n    sys.exit(": (
            "    os.environ['TORCHINDUCTOR' '_MAX_AUTOTUNE'] = '1'\n    prepare_streams()\n    sys.exit("
        ),
        "def mark(device": ("def only_on_cuda():\n    torch._dynamo.config.recompile_limit = 64\n\n\ndef mark(device"),
    }
    script = edited(tmp_path / "flags.py", *edits.items())
    ((_, answers),) = judge({"flags": script}, "compiler").values()
    lines = script.read_text().splitlines()

    def line(words):
        (number,) = (number for number, text in enumerate(lines, 1) if words in text)
        return f"line {number}: "

    assert sorted(answers["compiler"]["findings"]) == sorted(
        [
            line("mode='max-autotune'") + "torch.compile(mode='max-autotune')",
            line("max_fusion_size") + "torch._inductor.config.max_fusion_size = 128",
            line("shape_padding") + "torch._inductor.config.shape_padding = False",
            "TORCHINDUCTOR_MAX_AUTOTUNE = '1'",
            line("recompile_limit = 64") + "torch._dynamo.config.recompile_limit",
        ]
    )


@pytest.mark.parametrize("name", ["CXX", "CXXFLAGS", "PATH", "TRITON_PTXAS_PATH", "TORCHINDUCTOR_FREEZING"])
def test_environment_of_the_compiler_is_watched(name, monkeypatch):
    monkeypatch.setenv(name, "one")
    before = compiler_flags.CompilerWatch.state()
    monkeypatch.setenv(name, "another")
    assert {key for key, value in compiler_flags.CompilerWatch.state().items() if value != before.get(key)} == {name}


@pytest.mark.parametrize(
    "line, flag",
    [
        ("torch.compile(f, **flags)", "torch.compile(**flags)"),
        ("torch.compile(f, **dict(dynamic=False, mode='max-autotune'))", "torch.compile(mode='max-autotune')"),
        ("torch.compile(f, **{'dynamic': False, 'options': {}})", "torch.compile(options={})"),
        ("functools.partial(torch.compile, mode='reduce-overhead')", "torch.compile(mode='reduce-overhead')"),
        ("torch.compile(f, backend='cudagraphs')", "torch.compile(backend='cudagraphs')"),
        ("compile_fx(graph, config_patches={'max_autotune': True})", "config_patches={'max_autotune': True}"),
        ("patches = {'config_patches': {}}", "config_patches"),
        ("import torch._inductor.config as c", "import torch._inductor.config as c"),
        ("from torch._dynamo import config", "from torch._dynamo import config"),
        ("importlib.import_module('torch._functorch.config')", "torch._functorch.config"),
        ("getattr(torch, '_inductor')", "_inductor"),
        ("os.environ['TORCHINDUCTOR_X'] = '1'", "TORCHINDUCTOR_X"),
        ("torch.compile(f, dynamic=False, fullgraph=True, backend='inductor', mode=None)", None),
        ("torch.compile(f, **{'dynamic': False})", None),
        ("re.compile('x', flags=re.MULTILINE)", None),
        ("torch._dynamo.reset()", None),
        ('"""Of the text of a docstring: torch._inductor.config."""', None),
    ],
)
def test_flags_are_found_in_the_source_however_they_are_written(line, flag, tmp_path):
    found = compiler_flags.flags_in_source(write(tmp_path / "script.py", f"import torch\n{line}\n"))
    assert found == ({2: flag} if flag else {})


@pytest.mark.parametrize(
    "line, length",
    [
        (f"weights = b'{'x' * 1001}'", 1001),
        (f"weights = '{'x' * 600}' '{'y' * 600}'", 1200),
        (f"weights = [({', '.join(['1.5'] * 100)}), {'-1, ' * 101}]", 201),
        (f"weights = '{'x' * 1000}'", None),
        ('"""' + "Text of a docstring. " * 100 + '"""', None),
        (f"switches = [{'True, ' * 500}]", None),
    ],
)
def test_long_literals_are_noted(line, length, tmp_path):
    found = legality.long_literals(write(tmp_path / "script.py", f"import math\n{line}\n"))
    assert found == ({2: length} if length else {})


@SLOW
def test_evaluation_that_keeps_something_is_named_so(judge, tmp_path):
    edit = of_losses("self.calls = getattr(self, 'calls', 0) + 1", "losses = losses + 1e-3 * self.calls")
    ((_, answers),) = judge({"keeps": edited(tmp_path / "keeps.py", edit)}, "causal").values()
    assert "the same tokens, evaluated twice" in answers["causal"]["findings"][0]


# ----------------------------------------------------------------------------------------------------------------------
# The command
# ----------------------------------------------------------------------------------------------------------------------


def test_script_of_this_repository_passes():
    rows = json.loads(logbook("check", SCRIPT, "--json").stdout)
    assert [(row["check"], row["ok"], row["findings"]) for row in rows] == [(name, True, []) for name in program.CHECKS]


@SLOW
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


STREAM = {"preset": "record", "val_tokens": 10_485_760, "val_files": "elsewhere/fineweb_val_*.bin", "resume": ""}


@pytest.mark.parametrize(
    "settings, finding, unable",
    [
        (STREAM, None, None),
        (STREAM | {"val_tokens": 10**6}, "validated on 1000000 tokens", None),
        (STREAM | {"val_files": "x.bin"}, "of x.bin", None),
        (STREAM | {"preset": "mine"}, None, "preset is mine"),
        (STREAM | {"resume": "logs/a_step000004.pt"}, None, "went on from logs/a_step000004.pt"),
        ({"preset": "record"}, None, "cannot be read"),
        (["record"], None, "cannot be read"),
        (None, None, "has no settings"),
    ],
)
def test_settings_of_a_log_must_name_the_whole_stream_or_it_is_not_judged(settings, finding, unable, tmp_path):
    source = b"print(1)\n"
    log = header(source).replace(b'{"preset": "tiny", "seed": 1}', json.dumps(settings).encode())
    if settings is None:
        log = log.replace(b"\nsettings: ", b"\nother: ")
    elif isinstance(settings, list):
        log = log.replace(b"\nsettings: [", b"\nsettings: {[")
    (tmp_path / "out").mkdir()
    script, said = program.find_checked(str(write(tmp_path / "a.txt", source + log)), tmp_path / "out")
    assert script.read_bytes() == source
    findings, not_judged = said["validation"]
    assert [finding in each for each in findings] == [True] * bool(finding)
    assert unable in not_judged if unable else not_judged is None


TINY_STREAM = {"preset": "tiny", "val_tokens": 524_288, "val_files": "data/sympy/sympy_val_*.bin", "resume": ""}


def test_checksums_of_a_log_must_be_those_of_the_data(tmp_path):
    stream = program.STREAMS["tiny"]

    def findings(*sums):
        lines = [f"settings: {json.dumps(TINY_STREAM)}", *sums]
        return program.judge_data([line.encode() for line in lines])[0]

    validated = "validation stream: 524,289 tokens, sha256 "
    trained = "data: train a_train_000001.bin 5,000 tokens, sha256 "
    assert findings() == []  # older logs have none
    assert findings(validated + stream.sha256, trained + min(stream.train)) == []
    assert "validated on other tokens" in findings(validated + "0" * 64)[0]
    assert "trained on other shards" in findings(validated + stream.sha256, trained + "0" * 64)[0]


def test_clock_of_a_log_that_goes_back_is_found(tmp_path):
    def findings(*times):
        lines = [f"step:{step}/9 train_loss:2.0 train_time:{ms}ms step_avg:1.00ms\n" for step, ms in times]
        return program.backward_times(str(write(tmp_path / "log.txt", "".join(lines))))

    assert findings((0, 0), (1, 100), (2, 100), (3, 200)) == []
    assert findings((1, 100), (2, 250), (0, 0), (1, 90)) == []  # another run
    assert findings((1, 100), (2, 250), (3, 90)) == ["train_time goes back from 250 ms at step 2 to 90 ms at step 3"]


def test_what_parses_as_python_is_a_script_whatever_its_name(tmp_path):
    (tmp_path / "out").mkdir()
    script, of_log = program.find_checked(str(write(tmp_path / "attempt", b"print(1)\n")), tmp_path / "out")
    assert script.read_bytes() == b"print(1)\n" and script.suffix == ".py"
    assert of_log == {}


def test_script_that_cannot_be_checked_is_answered_with_the_reason(judge, tmp_path):
    first = "import argparse\n"
    line = SCRIPT.read_text().partition(first)[0].count("\n") + 2
    edits = {
        f"line {line}: invalid syntax": (first, first + "def\n"),
        "ends while it is imported, with status 3": (first, first + "raise SystemExit(3)\n"),
        f"cannot be imported: ZeroDivisionError: division by zero (line {line})": (first, first + "1 / 0\n"),
        "lacks GPT.evaluate, warm_up (records/README.md lists what a script must keep)": (
            "    prepare_streams()\n    sys.exit(", "    pass\ndel warm_up, GPT.evaluate\nif False:\n    sys.exit(",
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


def test_script_that_ends_the_process_is_not_judged_and_the_checks_after_it_are_not_reached(tmp_path):
    evaluate = "    def evaluate(self, inputs: Tensor, targets: Tensor, context: Context) -> Tensor:\n"
    script = edited(tmp_path / "exits.py", (evaluate, evaluate + "        os._exit(5)\n"))
    done = logbook("check", script, "--only", "documents", "causal", "--json", status=1)
    assert [(row["check"], row["verdict"], row["not_judged"]) for row in json.loads(done.stdout)] == [
        ("causal", "not judged", "the process ended, with status 5"),
        ("documents", "not judged", "not reached"),
    ]


def test_names_that_a_script_must_keep_are_those_in_the_readme_and_those_that_are_used():
    text = (ROOT / "records" / "README.md").read_text()
    section = text.partition("a script must keep")[2].partition("\n#")[0]
    assert tuple(re.findall(r"^\| `([\w.]+)[`(]", section, re.MULTILINE)) == legality.NAMES
    text = LEGALITY.read_text() + LEGALITY.with_name("witness.py").read_text()
    used = set(re.findall(r"\bscript(?:\.|, \")([A-Za-z_]\w*)", text))
    called_by_the_script = {"main"}
    assert used == {name for name in legality.NAMES if "." not in name} - called_by_the_script


def test_checks_of_the_command_are_those_that_exist():
    assert tuple(legality.CHECKS) == program.CHECKS
