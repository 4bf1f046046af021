import os
import sys

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile(
    "default",
    deadline=None,  # the first example of a size pays for what later ones find cached
    max_examples=60,
    derandomize=bool(os.environ.get("CI")),
)
hypothesis.settings.load_profile("default")


@pytest.fixture(autouse=True)
def _alone():
    """No test depends on which ran before it: the compiler gives up on code it saw too often."""
    torch.manual_seed(0)
    yield
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


@pytest.fixture
def device():
    """Where the suite runs: the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
