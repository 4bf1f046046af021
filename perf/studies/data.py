"""What a trial trains on and is tested on: windows of a text, or facts of known answer."""

import functools
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from .text import Text
from .tokens import make_tokens
from .trial import Trial

IGNORED = -100
"""A target that does not count: the default of torch's cross-entropy."""


class Data(Protocol):
    """Batches for training, each a function of the seed and the step alone, and a test set.

    Attributes:
        vocab_size: tokens known.
    """

    vocab_size: int

    def batch(self, step: int, rank: int = 0, ranks: int = 1) -> tuple[Tensor, Tensor]:
        """Inputs and targets [B, T], int64, of a step counted from 0; a rank's share of them."""
        ...

    def test_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and targets [B, T], int64, of the test set, in a fixed order."""
        ...

    def num_bytes(self, targets: Tensor) -> int:
        """Bytes that the targets stand for; 0 where that means nothing."""
        ...


class _Order:
    """Which of `count` examples a step takes: all once in every epoch, in a new order in each."""

    def __init__(self, count: int, batch: int, seed: int) -> None:
        self._count, self._batch, self._seed = count, batch, seed

    @functools.lru_cache(maxsize=2)  # noqa: B019 - lives as long as the data
    def _epoch(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed((self._seed * 1_000_003 + epoch) % 2**63)
        return torch.randperm(self._count, generator=generator)

    def indices(self, step: int, rank: int, ranks: int) -> Tensor:
        """Numbers of the examples of a step, [batch / ranks], int64."""
        places = torch.arange(step * self._batch, (step + 1) * self._batch)
        epochs = places // self._count
        chosen = [
            self._epoch(epoch)[places[epochs == epoch] % self._count]
            for epoch in range(int(epochs[0]), int(epochs[-1]) + 1)
        ]
        return torch.cat(chosen)[rank::ranks]


class TextData:
    """Windows of `context` tokens, end to end in the text, in a random order.

    Args:
        trial: with the tokens, the context, the batch and the seed.
        text: split by the hash of its documents.

    Raises:
        ValueError: the text has no window of that length on either side of the split.
    """

    def __init__(self, trial: Trial, text: Text) -> None:
        stream = _encode(text.sha256, trial.tokens, text)
        self.vocab_size = stream.vocab_size
        self._lengths = stream.lengths
        self._train, self._test = (self._windows(part, trial, text) for part in stream.parts)
        count = max(1, trial.eval_tokens // trial.context)
        # Spread over the whole test set, where only a part of it is wanted.
        step = max(1, len(self._test) // count)
        self._test = self._test[::step][:count]
        self._batch = trial.batch
        self._order = _Order(len(self._train), trial.batch, trial.seed)

    def _windows(self, stream: Tensor, trial: Trial, text: Text) -> Tensor:
        """Views [windows, context + 1]: the last token of one is the first of the next."""
        if len(stream) < trial.context + 1:
            raise ValueError(
                f"text: {text.name!r} makes {len(stream)} tokens on one side of the split, but "
                f"the context of {trial.context} needs at least {trial.context + 1}"
            )
        return stream.unfold(0, trial.context + 1, trial.context)

    def batch(self, step: int, rank: int = 0, ranks: int = 1) -> tuple[Tensor, Tensor]:
        """See `Data`."""
        windows = self._train[self._order.indices(step, rank, ranks)].to(torch.int64)
        return windows[:, :-1], windows[:, 1:]

    def test_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """See `Data`."""
        for windows in self._test.split(self._batch):
            yield windows[:, :-1].to(torch.int64), windows[:, 1:].to(torch.int64)

    def num_bytes(self, targets: Tensor) -> int:
        """See `Data`."""
        return int(self._lengths[targets].sum())


class _Stream:
    def __init__(self, name: str, text: Text) -> None:
        train, test = text.split()
        tokens = make_tokens(name, train)
        self.vocab_size = tokens.vocab_size
        self.lengths = tokens.lengths
        self.parts = tokens.encode(train), tokens.encode(test)


_streams: dict[tuple[str, str], _Stream] = {}


def _encode(sha256: str, name: str, text: Text) -> _Stream:
    """The text as tokens; the last one is kept, since all trials of a study share it."""
    if (sha256, name) not in _streams:
        made = _Stream(name, text)
        _streams.clear()
        _streams[sha256, name] = made
    return _streams[sha256, name]


class FactData:
    """Facts to be learned by heart: a key of three symbols, a value of two.

    Keys are drawn without repetition and values at random, so that nothing helps but memory, and
    every fact holds 16 bits. The test set is all facts; each is shown equally often in training.

    Args:
        trial: with the number of facts, the batch and the seed. The context must be 4.
        tuning: the facts for tuning, in the place of those before it.

    Raises:
        ValueError: the context is another, or there are more facts than keys.
    """

    KEY, VALUE, SYMBOLS = 3, 2, 256

    def __init__(self, trial: Trial, *, tuning: bool = False) -> None:
        if trial.context != self.KEY + self.VALUE - 1:
            raise ValueError(
                f"context: {trial.context} is not allowed; facts take {self.KEY + self.VALUE - 1}"
            )
        keys = self.SYMBOLS**self.KEY
        count = trial.facts + trial.tuning_facts
        if count > keys:
            raise ValueError(f"facts: {count} is too many; there are {keys} keys")
        self.vocab_size = self.SYMBOLS
        generator = torch.Generator().manual_seed(trial.seed)
        numbers = _distinct(count, keys, generator)
        places = self.SYMBOLS ** torch.arange(self.KEY)
        key = numbers.unsqueeze(-1) // places % self.SYMBOLS
        value = torch.randint(0, self.SYMBOLS, (count, self.VALUE), generator=generator)
        facts = torch.cat([key, value], dim=-1)
        self._facts = facts[trial.facts :] if tuning else facts[: trial.facts]
        self._batch = trial.batch
        self._order = _Order(len(self._facts), trial.batch, trial.seed)

    def _pair(self, facts: Tensor) -> tuple[Tensor, Tensor]:
        targets = facts[:, 1:].clone()
        targets[:, : self.KEY - 1] = IGNORED
        return facts[:, :-1], targets

    def batch(self, step: int, rank: int = 0, ranks: int = 1) -> tuple[Tensor, Tensor]:
        """See `Data`."""
        return self._pair(self._facts[self._order.indices(step, rank, ranks)])

    def test_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """See `Data`."""
        for facts in self._facts.split(self._batch):
            yield self._pair(facts)

    def num_bytes(self, targets: Tensor) -> int:
        """See `Data`."""
        return 0


def _distinct(count: int, limit: int, generator: torch.Generator) -> Tensor:
    """So many different numbers below `limit`, in random order, [count], int64."""
    if count > limit // 4:
        return torch.randperm(limit, generator=generator)[:count]
    numbers = torch.empty(0, dtype=torch.int64)
    while len(numbers) < count:  # a quarter of the draws at most is there already
        more = torch.randint(limit, (2 * count,), generator=generator)
        numbers = torch.cat([numbers, more]).unique()
    return numbers[torch.randperm(len(numbers), generator=generator)[:count]]


def make_data(trial: Trial, text: Text | None) -> Data:
    """The data of a trial.

    Args:
        trial: of either task.
        text: that the trial names; not needed for facts.

    Raises:
        ValueError: the data cannot be made with these parameters.
    """
    if trial.task == "facts":
        return FactData(trial)
    assert text is not None
    assert text.sha256 == trial.text_sha256
    return TextData(trial, text)
