"""For tests of what runs on GPUs."""

import pytest
import torch


@pytest.fixture(scope="module")
def compiled(eager_and_deterministic):
    """As in a real run, against what is right for all other tests: compiled, by the fastest algorithms."""
    torch.use_deterministic_algorithms(False)
    with torch.compiler.set_stance("default"):
        yield
    torch.use_deterministic_algorithms(True)
