"""The README's example of a new technique is a diff that applies, and that does what it says."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

CHECK = """
import torch
from dataclasses import replace
import train_gpt
from reference_gpt import ReferenceGPT, cross_entropy

sizes = {"vocab_size": 61, "bos_id": 60, "dim": 32, "heads": 4, "bigram_dim": 20}
config = replace(train_gpt.PRESETS["mini"].model, **sizes)
tokens = torch.randint(61, (25,), generator=torch.Generator().manual_seed(0))
torch.compiler.set_stance("force_eager")

def losses(config, factor):
    torch.manual_seed(0)
    model = train_gpt.GPT(config)
    for name, p in sorted(model.named_parameters()):
        p.data += 0.2 * torch.randn_like(p)
    if config.temperature:
        model.temperatures.data *= factor
    context = train_gpt.make_context(config, 24, (4, 8), model.embed)
    mine = model.evaluate(tokens[:-1].int(), tokens[1:], context)
    reference = ReferenceGPT(config, model.state_dict())
    expected = cross_entropy(reference.logits(tokens[:-1].tolist(), (4, 8)), tokens[1:].tolist())
    assert (mine - expected).abs().max() < 1e-4
    return mine

assert len(config.layers_with("temperature")) == 1
assert (losses(config, 1) - losses(config, 3)).abs().max() > 1e-3
losses(replace(config, temperature=False), 1)
settings, _ = train_gpt.parse_arguments(["--preset", "mini", "--temperature", "false"])
assert settings.model.layers_with("temperature") == []
"""


@pytest.mark.recipe  # the diff has lines of the tables around it
def test_the_technique_of_the_readme_is_a_diff_that_does_what_it_says(tmp_path):
    (diff,) = re.findall(r"```diff\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (tmp_path / "tests").mkdir()
    for name in ("train_gpt.py", "tests/reference_gpt.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    apply = subprocess.run(["git", "apply", "-"], input=diff, text=True, cwd=tmp_path, capture_output=True)
    assert apply.returncode == 0, apply.stderr
    environment = {"PYTHONPATH": f"{tmp_path}:{tmp_path / 'tests'}", "PATH": "/usr/bin:/bin"}
    check = subprocess.run([sys.executable, "-c", CHECK], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert check.returncode == 0, check.stderr
