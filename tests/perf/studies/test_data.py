import dataclasses
import math
from collections import Counter

import pytest
import torch

from pkm_triton.perf.studies.data import IGNORED, FactData, TextData, make_data
from pkm_triton.perf.studies.text import Text
from pkm_triton.perf.studies.tokens import make_tokens


def test_bytes_are_their_numbers():
    tokens = make_tokens("bytes", [])
    assert tokens.encode([b"a\xff", b"\x00"]).tolist() == [97, 255, 0]
    assert tokens.lengths.sum() == tokens.vocab_size == 256


def test_byte_pairs_lose_no_byte():
    pytest.importorskip("tokenizers")
    documents = ["zürich ähnlich naïve café ".encode() * 3, bytes(range(256)), b"the cat sat " * 50]
    tokens = make_tokens("bpe270", documents)
    stream = tokens.encode(documents)
    assert tokens.vocab_size == len(tokens.lengths) == 270
    assert stream.max() < 270
    size = sum(map(len, documents))
    assert tokens.lengths[stream.long()].sum() == size
    assert len(stream) < 0.7 * size
    again = make_tokens("bpe270", documents)
    assert torch.equal(again.encode(documents), stream)


def test_a_vocabulary_the_text_is_too_short_for():
    pytest.importorskip("tokenizers")
    with pytest.raises(ValueError, match="the text is too short for 5000 tokens"):
        make_tokens("bpe5000", [b"short"])


@pytest.mark.parametrize("name", ["bpe", "bpe256", "words", "", "bpe1e3"])
def test_unknown_tokens(name):
    with pytest.raises(ValueError, match=f"tokens: {name!r} is unknown"):
        make_tokens(name, [])


def test_without_the_library_bytes_are_offered(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(ValueError, match="'bpe300' needs the package tokenizers"):
        make_tokens("bpe300", [b"a"])


def test_every_window_is_trained_on_once_an_epoch_in_an_order_of_its_own(trial, text):
    data = TextData(trial, text)
    train, _ = text.split()
    stream = torch.frombuffer(bytearray(b"".join(train)), dtype=torch.uint8).long()
    windows = {tuple(stream[i : i + 17].tolist()) for i in range(0, len(stream) - 16, 16)}
    steps = len(windows) // trial.batch
    seen, order = Counter(), []
    for step in range(steps):
        inputs, targets = data.batch(step)
        assert inputs.shape == targets.shape == (4, 16)
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
        for first, rest in zip(inputs[:, :1], targets, strict=True):
            window = (*first.tolist(), *rest.tolist())
            seen[window] += 1
            order.append(window)
    assert set(seen) <= windows
    assert max(seen.values()) == 1
    later = [(*row.tolist(),) for s in range(steps, 2 * steps) for row in data.batch(s)[1]]
    assert [window[1:] for window in order] != later
    other = TextData(dataclasses.replace(trial, seed=1), text)
    assert not torch.equal(other.batch(0)[0], data.batch(0)[0])


def test_the_largest_seed_has_an_order_too(trial, text):
    data = make_data(dataclasses.replace(trial, seed=2**63 - 1), text)
    assert data.batch(0)[0].shape == (trial.batch, trial.context)


def test_ranks_share_a_batch(trial, text):
    data = TextData(trial, text)
    whole = data.batch(3)
    shares = [data.batch(3, rank, 2) for rank in range(2)]
    for part, both in zip(whole, zip(*shares, strict=True), strict=True):
        together = torch.stack(both, dim=1).flatten(0, 1)
        assert torch.equal(together, part)


def test_the_test_set_is_the_other_side_of_the_split(trial, text):
    data = TextData(dataclasses.replace(trial, eval_tokens=10**6), text)
    _, test = text.split()
    stream = b"".join(test)
    batches = list(data.test_batches())
    targets = torch.cat([targets for _, targets in batches])
    assert bytes(targets.flatten().tolist()) == stream[1 : 1 + targets.numel()]
    assert targets.numel() > len(stream) - 17
    assert data.num_bytes(targets) == targets.numel()
    few = TextData(dataclasses.replace(trial, eval_tokens=64), text)
    assert sum(len(targets) for _, targets in few.test_batches()) == 4


def test_a_text_shorter_than_a_context(trial, text):
    with pytest.raises(ValueError, match=r"makes \d+ tokens on one side of the split, but the con"):
        TextData(dataclasses.replace(trial, context=5000), text)


def test_facts_are_distinct_and_only_values_count(fact_trial):
    data = FactData(dataclasses.replace(fact_trial, facts=3000))
    facts = torch.cat(
        [torch.cat([inputs, targets[:, -1:]], dim=1) for inputs, targets in data.test_batches()]
    )
    assert facts.shape == (3000, 5)
    assert len({tuple(key) for key in facts[:, :3].tolist()}) == 3000
    assert facts.min() >= 0
    assert facts.max() < data.vocab_size == 256
    # Symbols are used evenly: 16 bits a fact, within what chance allows.
    counts = torch.bincount(facts[:, 3:].flatten(), minlength=256)
    expected = 6000 / 256
    assert ((counts - expected) ** 2 / expected).sum() < 255 + 5 * math.sqrt(2 * 255)
    inputs, targets = data.batch(0)
    assert (targets[:, :2] == IGNORED).all()
    assert torch.equal(inputs[:, 3], targets[:, 2])
    assert (targets[:, 2:] >= 0).all()


def test_facts_are_shown_equally_often(fact_trial):
    data = FactData(fact_trial)
    shown = Counter(tuple(row) for step in range(10) for row in data.batch(step)[0].tolist())
    assert set(shown.values()) == {2}  # 10 steps of 8 over 40 facts


def test_facts_of_a_wrong_shape(fact_trial):
    with pytest.raises(ValueError, match="context: 8 is not allowed; facts take 4"):
        make_data(dataclasses.replace(fact_trial, context=8), None)
    with pytest.raises(ValueError, match="facts: 16777217 is too many; there are 16777216 keys"):
        make_data(dataclasses.replace(fact_trial, facts=2**24 + 1), None)


def test_text_of_few_documents(trial):
    with pytest.raises(ValueError, match="too few to split"):
        TextData(trial, Text.of("one", [b"only one"]))
