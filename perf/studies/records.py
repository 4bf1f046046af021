"""The rows of a study's CSVs: a trial and what training gave, an architecture and its speed."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from pkm_triton.perf.records.row_file import added

from .trial import Trial

TRAINED_SCHEMA = 4
TIMED_SCHEMA = 4
"""Raised whenever a column is added (see `row_file.added`). 2: seconds of what is timed. 3:
fixed_keys and softmax of the trial. 4: its tuning."""

_NAN = math.nan
TRIAL_FIELDS = tuple(field.name for field in dataclasses.fields(Trial))


@dataclass(frozen=True)
class TrainedRow(Trial):
    """A trial and what training it gave. The fields are the header of the CSV, in this order.

    A figure that does not exist is NaN, an empty cell in the CSV. With several memories usage and
    KL are their means.

    Attributes:
        loss: mean cross-entropy over the test set, nats a token; over the values for facts.
        perplexity: exp(loss).
        bits_per_byte: loss over the bytes that the tokens stand for.
        recall: share of the facts of which every value token has the highest logit.
        usage, kl: of the memories over the test set (paper 4.2).
        reads_per_slot: reads of the evaluation over slots: usage is bounded by what was asked.
        kept: after tuning, the recall of the facts learned before it; the other figures are then of
            the facts that it was for.
        train_loss: mean loss of the last tenth of the steps.
        train_tokens: tokens trained on.
        parameters, memory_parameters: elements of all parameters, and of the memories'.
        tuned_parameters: elements of the parameters that tuning trained.
        seconds: of training, on this machine with whatever else it did.
        device_name: the processor or the GPU.
    """

    loss: float = _NAN
    perplexity: float = _NAN
    bits_per_byte: float = _NAN
    recall: float = _NAN
    usage: float = _NAN
    kl: float = _NAN
    reads_per_slot: float = _NAN
    kept: float = added(4, _NAN)
    train_loss: float = _NAN
    train_tokens: int = 0
    parameters: int = 0
    memory_parameters: int = 0
    tuned_parameters: int = added(4, 0)
    seconds: float = _NAN
    device_name: str = ""
    torch_version: str = ""
    triton_version: str = ""
    pkm_triton_version: str = ""
    commit: str = ""
    schema: int = TRAINED_SCHEMA

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes a row unique: its trial. The device decides speed only, not results."""
        return self.trial.key

    def problem(self) -> str | None:
        """Why these figures cannot be the results of a training, or None."""
        for name in ("perplexity", "usage", "reads_per_slot", "seconds"):
            if getattr(self, name) < 0:
                return f"{name} is {getattr(self, name)}; a figure of at least 0 was expected"
        return None

    @property
    def trial(self) -> Trial:
        """The parameters, without the results."""
        return Trial(**{name: getattr(self, name) for name in TRIAL_FIELDS})


@dataclass(frozen=True)
class TimedRow(Trial):
    """An architecture and its speed at inference. The fields are the header of the CSV.

    Attributes:
        sequences: in one call; each is as long as the context.
        threads: CPU threads.
        device_name: the processor or the GPU.
        vocab_size: tokens known.
        median_ms, low_ms, high_ms: median, lowest and highest of the rounds' medians of one call.
        rounds: how many rounds; in each every architecture of the study was timed once.
        seconds: time asked for on each model in each round; 0 where it was not recorded.
        tokens_per_s: tokens / median.
        parameters: elements of all parameters.
    """

    sequences: int = 1
    threads: int = 1
    device_name: str = ""
    vocab_size: int = 0
    median_ms: float = _NAN
    low_ms: float = _NAN
    high_ms: float = _NAN
    rounds: int = 0
    seconds: float = added(2, 0.0)
    tokens_per_s: float = _NAN
    parameters: int = 0
    torch_version: str = ""
    triton_version: str = ""
    pkm_triton_version: str = ""
    commit: str = ""
    schema: int = TIMED_SCHEMA

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes a row unique: its architecture, the call, the device and the time spent."""
        return (*self.trial.key, *self.call)

    @property
    def call(self) -> tuple[Any, ...]:
        """What was called, where and how long: speeds of one table share it."""
        size = (self.sequences, self.threads, self.device_name, self.vocab_size)
        return (*size, self.rounds, self.seconds)

    def problem(self) -> str | None:
        """Why these figures cannot have been measured, or None."""
        if not 0 < self.low_ms <= self.median_ms <= self.high_ms < math.inf:
            return (
                f"low_ms, median_ms and high_ms are {self.low_ms}, {self.median_ms} and "
                f"{self.high_ms}; rising times above 0 were expected"
            )
        return None

    @property
    def trial(self) -> Trial:
        """The architecture, without the results."""
        return Trial(**{name: getattr(self, name) for name in TRIAL_FIELDS})
