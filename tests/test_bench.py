"""The programs of bench: the ablation's table and resumption, the compiled kernels, step time, the plan of slices."""

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch.nn.attention.flex_attention import FlexKernelOptions

import train_gpt
from test_command_line import MODEL, data, launcher  # noqa: F401 (fixtures)

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / "bench"
sys.path.append(str(BENCH))

import ablate  # noqa: E402
import runs  # noqa: E402
import track  # noqa: E402


def write_log(path: Path, loss: float, step_ms: list[int], steps: int = 8, total: int = 8) -> None:
    """A log of so many steps, that take these times in turn."""
    lines, now = [f"{'=' * 100}", "settings: {}", f"{'=' * 100}"], 0
    for step in range(1, steps + 1):
        now += step_ms[step % len(step_ms)]
        lines.append(f"step:{step}/{total} train_loss:5.0000 train_time:{now}ms step_avg:{now / step:.2f}ms")
    lines.append(f"step:{steps}/{total} val_loss:{loss:.4f} train_time:{now}ms step_avg:{now / steps:.2f}ms")
    path.write_text("source\n" + "\n".join(lines) + "\n")


@pytest.fixture
def logs(tmp_path, monkeypatch):
    variants = {"all": ("nothing", []), "no_smear": ("smear", ["--smear", "false"])}
    monkeypatch.setattr(ablate, "variants", lambda: variants)
    for seed, (base, without) in enumerate([(1.5, 1.52), (1.4, 1.45), (1.6, 1.61)], 1):
        write_log(tmp_path / f"all-{seed}.txt", base, [100, 100, 900])
        write_log(tmp_path / f"no_smear-{seed}.txt", without, [110, 110, 300 * seed])
    return tmp_path


def test_ablation_has_the_mean_of_paired_differences_and_its_interval(logs):
    row = ablate.table(logs, 3).splitlines()[-1]
    # Differences 0.02, 0.05 and 0.01: mean 0.02667, standard deviation 0.02082; t of 2 degrees of freedom 4.3027.
    assert "| 3 | 1.5267 | +0.0267 ± 0.0517 | 1.10 |" in row
    assert row.startswith("| smear | `--smear false` |")


def test_ablation_leaves_out_runs_that_are_not_complete(logs):
    write_log(logs / "no_smear-2.txt", 1.0, [100], steps=4)
    row = ablate.table(logs, 3).splitlines()[-1]
    assert "| 2 | 1.5650 | +0.0150 ± " in row


def test_ablation_goes_on_where_it_was_cut_off(logs, monkeypatch, capsys):
    (logs / "all-3.txt").unlink()
    write_log(logs / "no_smear-1.txt", 1.0, [100], steps=4)
    trained = []

    def train(path, script, options):
        trained.append((path.name, script, options))
        write_log(path, 1.5, [100])

    monkeypatch.setattr(ablate, "train", train)
    monkeypatch.setattr(sys, "argv", ["ablate.py", "--out", str(logs), "--steps", "8"])
    assert ablate.main() == 0
    assert [name for name, _, _ in trained] == ["no_smear-1.txt", "all-3.txt"]
    for _, script, options in trained:
        settings, _ = train_gpt.parse_arguments(options)
        assert script == "train_gpt.py" and settings.total_steps == 8 and settings.preset == "tiny"
        assert settings.model.smear == ("--smear" not in options)
    assert (logs / "table.md").read_text() in capsys.readouterr().out


def test_every_technique_has_its_variant():
    names = set(ablate.variants())
    assert {"all", "plain", "adam", "no_smear", "no_mudd", "no_yarn", "no_length_schedule"} <= names
    assert len(names) == 3 + 16
    for _, options in ablate.variants().values():
        train_gpt.parse_arguments(["--preset", "tiny", *options])


def test_step_time_is_that_of_the_quickest_quarter(tmp_path):
    write_log(tmp_path / "x.txt", 1.5, [100, 101, 5000, 5000], steps=40, total=40)
    assert 100 <= runs.step_time(tmp_path / "x.txt") <= 101


def command(script, *arguments):
    options = [sys.executable, str(BENCH / script), *map(str, arguments)]
    return subprocess.run(options, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)


def test_kernels_compile_without_a_gpu_within_each_targets_limits():
    pytest.importorskip("triton")
    result = command("kernels.py", "--aot")
    assert result.returncode == 0, result.stdout + result.stderr
    rows = re.findall(r"^(.*\S)\s+sm_(\d+)\s+(\d+)\s+(\d+)\s+([\d,]+)\s+([\d,]+)$", result.stdout, re.MULTILINE)
    limits = {"80": 163 * 1024, "89": 99 * 1024, "90": 227 * 1024}
    for _, target, registers, stack, shared, limit in rows:
        assert int(limit.replace(",", "")) == limits[target] >= int(shared.replace(",", ""))
        assert 0 < int(registers) <= 255 and (target != "90" or stack == "0")
    assert {target for _, target, *_ in rows} == set(limits)
    assert sum("FP8" in name and target == "80" for name, target, *_ in rows) == 0
    assert len(rows) == 6 * 3 + 3 + 3 + 2 + 2 * 3 + 2  # symmetric, MLP, loss and transposes, the latter two also in FP8


def test_kernel_that_does_not_fit_is_a_negative_verdict(monkeypatch, capsys):
    pytest.importorskip("triton")
    import kernels

    kept = {name: getattr(train_gpt, name) for name in (*kernels.KERNELS, "has_kernels")}
    monkeypatch.setattr(train_gpt, "SYMMETRIC_TILES", (128, 128, 5, 8))
    monkeypatch.setattr(torch.cuda, "get_device_properties", None)
    first = next(kernels.cases("cpu", 16))
    monkeypatch.setattr(kernels, "cases", lambda device, tokens: [first])
    try:
        assert kernels.compile_all() == 1
    finally:
        vars(train_gpt).update(kept)
    assert "do not fit" in capsys.readouterr().out


@pytest.mark.slow
def test_every_graph_of_a_run_compiles_for_a_gpu_that_is_not_there():
    pytest.importorskip("triton")
    result = command("graphs.py", "--preset", "tiny", "--fp8", "false", "--target", "80")
    assert result.returncode == 0, result.stdout + result.stderr
    header, *rows = result.stdout.splitlines()
    assert header.startswith("sm_80 ")
    for row, name in zip(rows, ("training, 2,048 tokens", "validation, 16,384 tokens", "optimizers"), strict=True):
        seconds, triton, kernels, spill, shared, longest = row.removeprefix(name).replace(",", "").split()[:6]
        assert float(seconds) > float(triton) > float(longest) > 0
        assert float(longest) < 60, "a kernel that takes minutes to compile"
        assert int(kernels) > int(spill) >= 0 and 0 < int(shared) <= 163 * 1024
        assert int(kernels) < 130, "what all layers could do in one kernel, each does in its own"


def test_a_mistake_in_the_options_of_graphs_is_one_line():
    pytest.importorskip("triton")
    result = command("graphs.py", "--preset", "tinny")
    assert result.returncode == 2
    assert re.match("graphs.py: argument --preset: .*tinny.*record.*tiny", result.stderr.splitlines()[-1])


def test_step_time_prints_a_row_a_stage_and_where_its_time_goes(data):  # noqa: F811
    sizes = ("--val-tokens", "2048", "--val-seq-len", "1024", "--slices", "1")
    options = ("--preset", "tiny", *MODEL, *sizes, "--measure", "2", "--profile", "3")
    result = command("step_time.py", *options, "--train-files", data / "x_train_*.bin")
    assert result.returncode == 0, result.stderr
    rows = re.findall(r"^\| (\w+) \| 8,192 \| ([\d.]+) \| ([\d,]+) \| \d+% \| \d+ MiB \|$", result.stdout, re.MULTILINE)
    assert [name for name, _, _ in rows] == ["1", "2", "3", "extension"]
    for _, ms, speed in rows:
        assert int(speed.replace(",", "")) == pytest.approx(8192 / float(ms) * 1000, rel=0.01)
    assert re.search(r"first step after \d+ s", result.stdout)
    _, kinds, *stages = result.stdout.split("\n\n| ")[1:]
    titles, _, *rows = kinds.strip().splitlines()
    assert titles == "| stage 1 | stage 2 | stage 3 | stage extension |"
    table = {name: [float(cell) for cell in cells] for name, *cells in (row.strip("| ").split(" | ") for row in rows)}
    assert {"other products", "the rest"} <= table.keys() and all(min(cells) >= 0 for cells in table.values())
    assert len(stages) == 4
    for number, stage in enumerate(stages):
        title, _, *longest = stage.strip().splitlines()
        total = float(re.search(r"ms a step \| of ([\d.]+) \|", title)[1])
        assert total == pytest.approx(sum(cells[number] for cells in table.values()), abs=0.1)
        spent = [float(row.split(" | ")[1]) for row in longest]
        assert len(spent) == 3 and spent == sorted(spent, reverse=True) and sum(spent) < total
    result = command("step_time.py", "--preset", "tiny", "--train-files", "none_*.bin")
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "none_*.bin" in result.stderr


def test_a_profile_knows_the_kinds_of_kernels_that_a_gpu_runs():
    import step_time

    kinds = {
        "triton_tem_fused__to_copy_flex_attention_mul_transpose_12": "attention",
        "nvjet_sm90_tst_192x192_64x4_2x1_v_bz_coopA_TNT": "other products",
        "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16>": "other products",
        "triton_poi_fused__to_copy_add_cat_embedding_dense_backward_3": "compiled",
        "symmetric_kernel": "symmetric products",
        "mlp_kernel": "MLP",
        "Memcpy HtoD (Pinned -> Device)": "copies, communication",
        "ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL": "copies, communication",
        "void at::native::vectorized_elementwise_kernel<4>": "the rest",
    }
    assert {name: step_time.kind(name) for name in kinds} == kinds


def test_attention_prints_a_cell_a_stage_and_one_for_the_validation(data):  # noqa: F811
    files = ("--train-files", data / "x_train_*.bin", "--val-files", data / "x_val_*.bin")
    options = ("--preset", "tiny", *MODEL, "--val-tokens", "2048", "--val-seq-len", "1024", *files)
    result = command("attention.py", *options)
    assert result.returncode == 0, result.stderr
    titles, _, row = result.stdout.strip().splitlines()[-3:]
    sizes = [f"stage {n}, 2,048 tokens" for n in (1, 2, 3)]
    assert titles == f"| | {' | '.join([*sizes, 'validation, 1,024 tokens'])} | largest error |"
    assert re.fullmatch(r"\| train_gpt.py \|( [\d.]+ \+ -?[\d.]+ \|){3} [\d.]+ \| \S+ \|", row)
    assert float(row.split()[-2]) < 1e-5


def test_options_of_flex_attention_are_those_that_pytorch_documents():
    import attention

    for sizes in attention.FLEX:
        options = attention.flex_options(*sizes)
        assert {name[4:] for name in options} <= set(FlexKernelOptions.__annotations__)
        assert {name[:4] for name in options} == {"fwd_", "bwd_"}
        assert all(train_gpt.BLOCK % size == 0 for name, size in options.items() if "BLOCK" in name)
        assert options["bwd_BLOCK_N1"] % options["bwd_BLOCK_M1"] == 0  # asserted in its kernel, both
        assert options["bwd_BLOCK_M2"] % options["bwd_BLOCK_N2"] == 0


def test_flash_attention_sees_what_banded_attention_sees(monkeypatch):
    import attention

    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size):
        """What PyTorch documents of the function of this name, which needs CUDA."""
        (left, right), output = window_size, torch.empty_like(query)
        assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and max_q == max_k == cu_seq_q.diff().max()
        for (first, last), (first_k, last_k) in zip(pairwise(cu_seq_q.tolist()), pairwise(cu_seq_k.tolist())):
            q, k, v = query[first:last], key[first_k:last_k], value[first_k:last_k]
            back = torch.arange(len(q))[:, None] - torch.arange(len(k))
            logits = scale * torch.einsum("qhd,khd->hqk", q, k)
            weights = logits.masked_fill((back > left) | (back < -right), -torch.inf).softmax(-1)
            output[first:last] = torch.einsum("hqk,khd->qhd", weights, v)
        return output

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    docs = torch.tensor([1] * 7 + [2] + [3] * 40 + [4] * 9)
    q, k, v = torch.randn(3, len(docs), 2, 16)
    found = attention.flash(docs, 5, torch.tensor(0.1))(q, k, v)
    expected = train_gpt.attend(q, k, v, train_gpt.banded_mask(docs, 5), torch.tensor(0.1))
    torch.testing.assert_close(found, expected)


def test_plan_names_the_slices_for_each_card():
    result = command("plan.py")
    assert result.returncode == 0, result.stderr
    needs = {
        int(n): float(gb) for n, gb in re.findall(r"^\| (\d+) \| [\d,]+ \| ([\d.]+) \|$", result.stdout, re.MULTILINE)
    }
    assert sorted(needs) == [8, 16, 32, 64] and sorted(needs.values(), reverse=True) == list(needs.values())
    for card, slices in re.findall(r"^(\d+) GB: --slices (\d+)$", result.stdout, re.MULTILINE):
        assert needs[int(slices)] <= 0.9 * int(card)
        assert slices == "8" or needs[int(slices) // 2] > 0.9 * int(card)
    assert command("plan.py", "--slicez", "8").returncode == 2


# ----------------------------------------------------------------------------------------------------------------------
# The laptop track
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def laptop(tmp_path, monkeypatch):
    """Training in which a step takes 10 ms and the loss follows a formula; returns what was trained."""
    trained = []

    def train(path, script, options, alone=True):
        values = (
            dict(zip(options[::2], options[1::2])) if len(options) % 2 == 0 else dict(zip(options[1::2], options[2::2]))
        )
        steps, seed = int(values["--steps"]), int(values["--seed"])
        rate, batch = float(values.get("--lr", 2.4e-3)), int(values.get("--batch-tokens", 1024))
        speed = 1 if script == track.BASELINE else 2 - options.count("false") / 20
        loss = 1 + 5 / (1 + 0.001 * speed * steps) + abs(rate - 2.4e-3) + abs(batch - 1024) * 1e-5 + 1e-4 * seed
        trained.append(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_log(path, loss, [10], steps=steps, total=steps)
        settings = f'{{"steps": {steps}, "batch_tokens": {batch}}}'
        path.write_text(path.read_text().replace("settings: {}", f"settings: {settings}"))

    monkeypatch.setattr(track, "train", train)
    monkeypatch.setattr(track, "OUT", tmp_path)
    monkeypatch.setattr(track, "README", tmp_path / "README.md")
    monkeypatch.setattr(track, "PRESET", tmp_path / "_preset" / "run.txt")
    sections = "".join(f"<!-- {name} -->\nNot measured yet.\n<!-- end of {name} -->\n" for name in ("records", "grid"))
    track.README.write_text(sections)
    monkeypatch.setattr(track, "BASELINE_SECONDS", 8)
    monkeypatch.setattr(track, "GRID_SECONDS", 1)
    return trained


def test_track_finds_the_best_point_the_target_and_the_fewest_steps_to_it(laptop, tmp_path):
    best = track.grid()
    assert best == track.baseline(2.4e-3, 1024)
    target, steps = track.search(track.history(best))
    # 800 steps of 10 ms: a loss of 1 + 5 / 1.8 and a bit, and the margin.
    assert steps["0_baseline"] == 800 and target == 3.82
    for record in track.history(best)[1:]:
        loss = 1 + 5 / (1 + 0.001 * (2 - record.options.count("false") / 20) * steps[record.name]) + 1e-4
        assert 3.76 <= round(loss, 4) <= 3.78, record.name
    before = len(laptop)
    assert track.grid() == best and track.search(track.history(best)) == (target, steps)
    assert len(laptop) == before  # nothing is run twice
    track.runs(track.history(best), target, steps, 3)
    assert len(laptop) == before + 6 * 3 + 1
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "README.md").read_text()
    assert "**5." in text and "Not measured" not in text and "3.82 nats per byte. Runs of each record: 3." in text
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| [")]
    assert [row[0] for row in rows] == [f"[{name}](2026-11-21_{name})" for name in steps]
    for name, (_, _, count, loss, p, seconds, sooner, tokens, fewer) in zip(steps, rows):
        assert int(count) == steps[name]
        # A step takes 10 ms, and losses rise by 1e-4 from seed to seed: a half interval of 4.3027 * 1e-4 / sqrt(3).
        assert loss.endswith(" ± 0.0002") and float(loss.split()[0]) <= 3.7803 and float(p) < 0.01
        assert seconds.split()[1:] == ["±", "0.0"] and float(seconds.split()[0]) == pytest.approx(
            steps[name] / 100, abs=0.051
        )
        assert float(sooner.split()[0]) == pytest.approx(800 / steps[name], abs=0.01)
        assert float(tokens) == pytest.approx(steps[name] * 1024 / 1e6, abs=0.0051)
        assert float(fewer) == pytest.approx(800 / steps[name], abs=0.01)


def test_times_are_compared_with_the_baseline_of_the_same_seed(laptop):
    records = track.history(track.baseline(2.4e-3, 1024))[:2]
    for record, times in zip(records, ([10, 20], [5, 5])):
        for seed, milliseconds in enumerate(times, 1):
            track.run(record, path := record.run(seed), 100, seed)
            path.write_text(re.sub(r"train_time:\d+ms", f"train_time:{100 * milliseconds}ms", path.read_text()))
    # Ratios of 2 and 4: 3 +- 12.7062 * sqrt(2) / sqrt(2).
    assert "| 3.00 ± 12.71 |" in track.table(records, 3.79, 2).splitlines()[-1]


def test_best_point_on_the_edge_of_the_grid_is_a_mistake(laptop, monkeypatch):
    monkeypatch.setattr(track, "RATES", (2.4e-3, 4.8e-3))
    with pytest.raises(SystemExit) as end:
        track.grid()
    assert "edge" in str(end.value)


def test_record_that_takes_longer_than_the_baseline_is_a_mistake(laptop):
    record = track.history(track.grid())[1]
    with pytest.raises(SystemExit) as end:
        track.fewest_steps(record, aim=1.01, steps=50, limit=100)
    assert record.name in str(end.value) and "not 1.01" in str(end.value)


def test_every_record_of_the_track_has_options_that_exist():
    off = []
    for record in track.history(track.baseline(1e-3, 4096))[1:]:
        settings, _ = train_gpt.parse_arguments([*record.options, "--steps", "50", "--seed", "3"])
        off.append(sum(word == "false" for word in record.options))
    assert off == sorted(off, reverse=True) and off[-1] == 0
    names = {f"--{name.replace('_', '-')}" for name in ablate.TECHNIQUES}
    assert set(track.TECHNIQUES) == names


def test_tokens_of_a_run_come_from_its_log(tmp_path):
    settings, _ = train_gpt.parse_arguments(["--preset", "tiny", "--steps", "37"])
    (tmp_path / "x.txt").write_text(f"source\nsettings: {json.dumps(asdict(settings))}\n")
    assert track.tokens_of(tmp_path / "x.txt") == 37 * 8192
