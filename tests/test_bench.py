"""The programs of bench: the compiled kernels and graphs, step time, attention, the plan of slices, costs."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import FlexKernelOptions

import command as command_module
import recipe
import train_gpt
from test_command_line import MODEL, STAGES, enough  # noqa: F401 (a fixture)

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / "bench"


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

    kept = {name: getattr(train_gpt, name) for name in kernels.KERNELS}
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
@pytest.mark.recipe
def test_every_graph_of_a_run_compiles_for_a_gpu_that_is_not_there():
    pytest.importorskip("triton")
    result = command("graphs.py", "--preset", "mini", "--fp8", "false", "--target", "80")
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


def test_step_time_prints_a_row_a_stage_and_where_its_time_goes(enough):  # noqa: F811
    sizes = ("--val-tokens", "2048", "--val-seq-len", "1024", "--slices", "1")
    options = ("--preset", "mini", *MODEL, *sizes, "--measure", "2", "--profile", "3")
    result = command("step_time.py", *options, *enough)
    assert result.returncode == 0, result.stderr
    row = r"^\| (\w+) \| ([\d,]+) \| ([\d.]+) \| ([\d,]+) \| \d+% \| \d+ MiB \|$"
    rows = re.findall(row, result.stdout, re.MULTILINE)
    names = [*(str(number) for number in range(1, len(STAGES))), "extension"]
    assert [name for name, *_ in rows] == names
    for (_, batch, ms, speed), stage in zip(rows, STAGES, strict=True):
        assert batch == f"{stage.batch_tokens:,}"
        found = int(speed.replace(",", ""))
        assert found == pytest.approx(stage.batch_tokens / float(ms) * 1000, rel=0.01)
    assert re.search(r"first step after \d+ s", result.stdout)
    _, kinds, *stages = result.stdout.split("\n\n| ")[1:]
    titles, _, *rows = kinds.strip().splitlines()
    assert titles == f"| {' | '.join(f'stage {name}' for name in names)} |"
    table = {name: [float(cell) for cell in cells] for name, *cells in (row.strip("| ").split(" | ") for row in rows)}
    floor = table.pop("the floor: matmuls alone, at the peak")
    assert {"other matmuls", "the rest"} <= table.keys() and all(min(cells) >= 0 for cells in table.values())
    peak = 1e12 * float(re.search(r"large matmul ([\d.]+) TFLOP/s", result.stdout)[1])
    # Forward and backward at least; attention and NorMuon multiply, too.
    settings, _ = train_gpt.parse_arguments([*options[:-4]])
    for stage, ms in zip(STAGES, floor, strict=True):
        alone = dataclasses.replace(stage, windows=(0, 0))
        least = stage.batch_tokens * train_gpt.flops_per_token(settings.model, alone) / peak * 1000
        assert least * 0.9 < ms < 3 * least + 10
    assert len(stages) == len(STAGES)
    for number, stage in enumerate(stages):
        title, _, *longest = stage.strip().splitlines()
        total = float(re.search(r"ms a step \| of ([\d.]+) \|", title)[1])
        assert total == pytest.approx(sum(cells[number] for cells in table.values()), abs=0.1)
        spent = [float(row.split(" | ")[1]) for row in longest]
        assert len(spent) == 3 and spent == sorted(spent, reverse=True) and sum(spent) < total
    result = command("step_time.py", "--preset", "mini", "--train-files", "none_*.bin")
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "none_*.bin" in result.stderr


def test_a_profile_knows_the_kinds_of_kernels_that_a_gpu_runs():
    import step_time

    kinds = {
        "triton_tem_fused__to_copy_flex_attention_mul_transpose_12": "attention",
        "nvjet_sm90_tst_192x192_64x4_2x1_v_bz_coopA_TNT": "other matmuls",
        "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16>": "other matmuls",
        "triton_poi_fused__to_copy_add_cat_embedding_dense_backward_3": "compiled",
        "symmetric_kernel": "symmetric matmuls",
        "mlp_kernel": "MLP",
        "Memcpy HtoD (Pinned -> Device)": "copies, communication",
        "ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL": "copies, communication",
        "void at::native::vectorized_elementwise_kernel<4>": "the rest",
    }
    assert {name: step_time.kind(name) for name in kinds} == kinds


def test_attention_prints_a_cell_a_stage_and_one_for_the_validation(enough):  # noqa: F811
    options = ("--preset", "mini", *MODEL, "--val-tokens", "2048", "--val-seq-len", "1024", *enough)
    result = command("attention.py", *options)
    assert result.returncode == 0, result.stderr
    titles, _, row = result.stdout.strip().splitlines()[-3:]
    slices = train_gpt.PRESETS["mini"].slices
    sizes = []
    for number, stage in enumerate(STAGES[:-1], 1):
        sizes.append(f"stage {number}, {stage.batch_tokens // slices:,} tokens")
    assert titles == f"| | {' | '.join([*sizes, 'validation, 1,024 tokens'])} | largest error |"
    cells = rf"( [\d.]+ \+ -?[\d.]+ \|){{{len(sizes)}}} [\d.]+ \| \S+ \|"
    assert re.fullmatch(rf"\| train_gpt.py \|{cells}", row)
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
    found = attention.flash(docs, 5)(q, k, v)
    expected = train_gpt.attend(q, k, v, train_gpt.banded_mask(docs, 5))
    torch.testing.assert_close(found, expected)


def test_plan_names_the_slices_for_each_card(monkeypatch, capsys):
    import plan

    monkeypatch.setattr(train_gpt, "PRESETS", recipe.PRESETS)
    monkeypatch.setattr(sys, "argv", ["plan.py"])
    plan.main()
    printed = capsys.readouterr().out
    rows = re.findall(r"^\| (\d+) \| [\d,]+ \| ([\d,]+) \|$", printed, re.MULTILINE)
    needs = {int(slices): int(mebibytes.replace(",", "")) for slices, mebibytes in rows}
    assert sorted(needs) == [8, 16, 32, 64] and sorted(needs.values(), reverse=True) == list(needs.values())
    for card, slices in re.findall(r"^(\d+) GB: --slices (\d+)$", printed, re.MULTILINE):
        room = 0.9 * 1024 * int(card)
        assert needs[int(slices)] <= room
        assert slices == "8" or needs[int(slices) // 2] > room
    assert command("plan.py", "--slicez", "8").returncode == 2


FITTING = [(80, 1, "--slices 8"), (24, 1, "--slices 32"), (80, 16, "--slices 16"), (2, 1, None), (80, 3, None)]


@pytest.mark.parametrize(("gigabytes", "processes", "answer"), FITTING)
def test_plan_names_the_slices_that_fit_into_the_gpu_at_hand(gigabytes, processes, answer, monkeypatch, capsys):
    import plan

    monkeypatch.setattr(train_gpt, "PRESETS", recipe.PRESETS)
    monkeypatch.setattr(train_gpt, "find_world", lambda: train_gpt.World(0, 1, torch.device("cuda")))
    card = SimpleNamespace(total_memory=gigabytes << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(sys, "argv", ["plan.py", "--fit", str(processes)])
    if answer:
        plan.main()
        assert capsys.readouterr().out == answer + "\n"
    else:
        where = f"{processes} processes with GPUs of {gigabytes << 10:,} MiB"
        with pytest.raises(command_module.UserError, match=f"finds no --slices for {where}"):
            plan.main()


# ----------------------------------------------------------------------------------------------------------------------
# A GPU's half hour
# ----------------------------------------------------------------------------------------------------------------------

PARTS = [
    "environment", "kernels", "shards", "slices", "training", "graphs", "step_time", "kernel_times", "attention",
    "memory", "plain",
]  # fmt: skip


def half_hour(out: Path, *options, **environment) -> tuple[dict[str, str], str]:
    """The result of each part of gpu.sh by its name, and its summary."""
    command = [BENCH / "gpu.sh", out, *options]
    run = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    summary = (out / "summary.md").read_text()
    assert run.stdout == summary
    results = dict(re.findall(r"^\| \[(\w+)\]\(\1\.txt\) \| (.+?) \| \d+ \|$", summary, re.MULTILINE))
    assert list(results) == PARTS and all((out / f"{part}.txt").exists() for part in PARTS)
    return results, summary


def test_a_gpus_half_hour_says_what_failed_or_took_too_long_and_goes_on(tmp_path):
    python = tmp_path / "python"
    python.write_text("""#!/bin/sh
        echo "$*" >> "$(dirname "$0")/calls"
        case "$*" in
            *kernels.py*) echo fine ;;
            *--fit*) echo "--slices 32" ;;
            *_plain*) echo "step:100/100 val_loss:3.5" ;;
            *train_gpt.py*) echo begun; sleep 60 ;;
            *) echo "a | b" >&2; exit 3 ;;
        esac
    """)
    python.chmod(0o755)
    results, summary = half_hour(tmp_path / "out", "--seed", "7", PYTHON=str(python), LIMIT="1")
    failed = "failed with status 3: a / b"
    assert results == {
        **dict.fromkeys(PARTS, failed), "kernels": "ok", "slices": "ok", "training": "cut off after 1 s",
        "kernel_times": "ok", "plain": "ok",
    }  # fmt: skip
    assert (tmp_path / "out" / "training.txt").read_text() == "begun\n"
    assert "kernels: none; without, in bf16: step:100/100 val_loss:3.5" in summary
    assert "## kernel_times\n\nfine" in summary
    calls = (tmp_path / "calls").read_text().splitlines()
    runs = [call for call in calls if call.startswith(("train_gpt.py", "bench/step_time.py", "bench/attention.py"))]
    assert len(runs) == 4 and all("--slices 32 --seed 7" in call for call in runs)


# ----------------------------------------------------------------------------------------------------------------------
# Polar Express
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("low, high", [(0.001, 1), (0.02, 1), (0.05, 1.7), (0.5, 1.2), (0.9, 1.1)])
def test_best_step_of_polar_express_is_as_far_from_1_at_four_points_in_turn_as_anywhere(low, high):
    """Which, by Chebyshev's theorem, no other a s + b s^3 + c s^5 betters."""
    import polar

    a, b, c = polar.best_row(low, high)
    s = np.linspace(low, high, 100_001)
    error = a * s + b * s**3 + c * s**5 - 1
    distance = abs(error).max()
    there = error[abs(error) > distance * (1 - 1e-6)]
    signs = [int(sign) for sign in np.sign(there)]
    assert [sign for sign, before in zip(signs, [None, *signs]) if sign != before] == [-1, 1, -1, 1]


def polar_prints(monkeypatch, capsys, *arguments):
    import polar

    monkeypatch.setattr(sys, "argv", ["polar.py", *map(str, arguments)])
    polar.main()
    return capsys.readouterr().out


@pytest.mark.parametrize("steps", train_gpt.POLAR_EXPRESS)
def test_each_table_of_polar_express_is_what_polar_prints_with_the_range_that_it_has(steps, monkeypatch, capsys):
    *rows, exact, rounded = polar_prints(monkeypatch, capsys, "--steps", steps).splitlines()
    table = train_gpt.POLAR_EXPRESS[steps]
    np.testing.assert_allclose([eval(row)[0] for row in rows], table, rtol=1e-9)
    s = np.geomspace(0.001, 1, 30_011)
    for a, b, c in table:
        s = a * s + b * s**3 + c * s**5
    for line, tolerance in ((exact, 1e-4), (rounded, 0.015)):
        low, high = re.search(r"^from 0\.001 on: ([\d.]+) to ([\d.]+) ", line).groups()
        assert (float(low), float(high)) == pytest.approx((s.min(), s.max()), abs=tolerance)


@pytest.mark.parametrize("option", ["--lower", "--safety", "--cushion"])
def test_an_interval_that_polar_cannot_work_with_is_a_users_mistake(option, monkeypatch, capsys):
    with pytest.raises(command_module.UserError, match=f"{option} 0.2: must be "):
        polar_prints(monkeypatch, capsys, option, "0.2")


# ----------------------------------------------------------------------------------------------------------------------
# The count of costs
# ----------------------------------------------------------------------------------------------------------------------


def test_attention_is_counted_like_the_models_flops_and_its_logits_once_more():
    import cost

    stage = recipe.RECORD.stages[0]
    for config in recipe.RECORD.model, recipe.PRESETS["next"].model:
        # flops_per_token has forward and twice as much backward; the window of composed heads is another part here.
        alone = dataclasses.replace(config, dc=False)
        no_keys = dataclasses.replace(stage, windows=(0, 0))
        products = train_gpt.flops_per_token(alone, stage) - train_gpt.flops_per_token(alone, no_keys)
        logits_again = 0
        for row in alone.rows:
            if row.attention:
                keys = stage.windows[row.window == "long"]
                logits_again += 2 * keys * (384 if row.narrow_qk else 768)
        assert cost.attention_flops(config, stage, tokens=10) == 10 * (products + logits_again)


def test_a_kernel_takes_the_longer_of_its_bytes_and_its_flops_and_its_launch():
    import cost

    h100, small = cost.CARDS["h100"], cost.CARDS["rtx3090"]
    assert cost.Kernel("MLP", 3_350_000_000, 989_000_000).seconds(h100) == pytest.approx(1e-3 + 2e-6)
    assert cost.Kernel("MLP", 3_350_000, 989_000_000_000).seconds(h100) == pytest.approx(1e-3 + 2e-6)
    assert cost.Kernel("MLP", 0, 1_979_000_000_000, "fp8", launches=0.5).seconds(h100) == pytest.approx(1e-3 + 1e-6)
    assert cost.Kernel("communication", 450_000_000).seconds(h100) == pytest.approx(1e-3 + 2e-6)
    assert cost.Kernel("MLP", 936_000_000, 71_000_000_000).seconds(small) == pytest.approx(1e-3 + 2e-6)


def test_what_runs_every_second_step_is_counted_half():
    import cost

    table = {"lm_head": train_gpt.ParameterRow("table", (800, 10), None, (0.5, 0.95), 1, 1, None)}
    settings = recipe.RECORD
    hypers = [train_gpt.schedule(settings, step) for step in range(4)]
    update, travel, small = cost.optimizer_kernels(settings, table, 1, hypers, ranks=8)
    # An eighth of the parameters: weights in bf16 read and written, gradients read, two float32 averages likewise.
    assert (update.bytes, update.launches) == (1000 * 22 / 2, 0.5)
    assert travel.bytes == 8000 * (2 + 2) * 7 / 8 / 2
    assert small == cost.Kernel("communication", 0, launches=0.5)  # one reduction, of what is small


@pytest.mark.slow
def test_products_of_the_compiled_graphs_are_the_models(tmp_path):
    pytest.importorskip("triton")
    # A width that is not also the number of the head's columns, by which the parts are told apart.
    options = ("--preset", "mini", "--slices", 8, "--steps", 4, "--dim", 512, "--heads", 4)
    result = command("cost.py", "--save", tmp_path / "counts.json", *options)
    assert result.returncode == 0, result.stderr
    stages = json.loads((tmp_path / "counts.json").read_text())
    assert list(stages) == ["stage 1", "stage 2", "stage 3", "extension"]
    tokens, layers, attending = 8192 / 8, 5, 4
    for rows in stages.values():
        launches, _, bf16, fp8, _ = rows["MLP"]
        assert (bf16 + fp8) * 1e12 == pytest.approx(6 * 8 * 512**2 * layers * tokens)
        assert fp8 * 1e12 == pytest.approx(2 * 8 * 512**2 * layers * tokens)  # forward
        assert rows["projections"][2] * 1e12 == pytest.approx(6 * 4 * 512**2 * attending * tokens)
        assert sum(row[0] for part, row in rows.items() if part != "total") == pytest.approx(rows["total"][0])
    again = command("cost.py", "--against", tmp_path / "counts.json", *options)
    ratios = re.findall(r" (\d\.\d\d)$", again.stdout, re.MULTILINE)
    assert len(ratios) > 20 and set(ratios) == {"1.00"}
    assert "no counts of --save" in command("cost.py", "--against", tmp_path / "none.json", *options).stderr
    # One GPU computes all eight slices, sends nothing, and updates all parameters; without FP8 nothing is in 8 bits.
    alone = command("cost.py", "--gpus", 1, "--card", "a100", "--save", tmp_path / "alone.json", *options)
    assert alone.returncode == 0 and alone.stdout.endswith(" s expected on 1 x A100, 80 GB\n"), alone.stderr
    for name, rows in json.loads((tmp_path / "alone.json").read_text()).items():
        assert "communication" not in rows and rows["total"][3] == 0
        assert rows["MLP"][2] == pytest.approx(8 * sum(stages[name]["MLP"][2:4]))
        assert rows["optimizer"][1] > 4 * stages[name]["optimizer"][1]
    refused = command("cost.py", "--card", "rtx4090")
    assert refused.returncode == 2 and "--gpus 1" in refused.stderr
