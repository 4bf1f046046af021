import dataclasses

import pytest
import torch

from pkm_triton.perf.studies.presets import PRESETS
from pkm_triton.perf.studies.text import Text


@pytest.fixture(autouse=True)
def _one_thread():
    """The models are so small that threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def text():
    words = "the cat sat on a mat and ate some fish while birds sang in old green trees"
    words = words.split()
    numbers = torch.randint(len(words), (400, 12), generator=torch.Generator().manual_seed(0))
    lines = [" ".join(words[i] for i in row) + ".\n" for row in numbers.tolist()]
    return Text.of("sentences", [line.encode() for line in lines])


@pytest.fixture
def trial(text):
    """A small model of text with a memory."""
    return dataclasses.replace(
        PRESETS["tiny"].text, text=text.name, text_size=text.size, text_sha256=text.sha256
    )


@pytest.fixture
def fact_trial():
    """A small model of facts with a memory."""
    return PRESETS["tiny"].facts


@pytest.fixture
def double_precision():
    """So that rounding does not hide what is wrong."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
