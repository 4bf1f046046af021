"""Tokens a second at inference of a study's models, with random weights."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pkm_triton.perf.measure.memory import available_bytes
from pkm_triton.perf.measure.timing import time_passes
from pkm_triton.perf.measure.workload import Pass
from pkm_triton.perf.records.environment import device_name, versions
from pkm_triton.perf.records.row_file import RowFile

from .models import build_model
from .records import TimedRow
from .training import mixed_precision
from .trial import Trial

ROUNDS = 5


def time_models(
    trials: Sequence[Trial],
    file: RowFile[TimedRow],
    *,
    vocab_size: int,
    sequences: int,
    seconds: float,
    device: str = "cpu",
    rounds: int = ROUNDS,
    progress: Callable[[str], None] = print,
) -> int:
    """Time the architectures that `file` does not hold yet, and add a row for each.

    In each round every model is built, run once to warm up, and timed; so a slow spell of the
    machine hits all of them, and only one is in memory at a time. The weights are random: how
    long a model takes does not depend on what it has learned, but for how far apart the rows lie
    that its memories read.

    Args:
        trials: what to time; those of one architecture are timed once.
        file: where rows are added, after the last round.
        vocab_size: tokens known.
        sequences: in one call, each as long as the trial's context.
        seconds: time to spend on each model in each round.
        device: `cpu` or `cuda`.
        rounds: how many.
        progress: is told what is timed.

    Returns:
        The number of architectures timed.

    Raises:
        ValueError: a model needs more memory than there is; nothing has been timed then.
    """
    threads = torch.get_num_threads()
    name = device_name(device)
    open_trials = []
    for trial in dict.fromkeys(each.architecture() for each in trials):
        row = TimedRow(
            **dataclasses.asdict(trial),
            sequences=sequences,
            threads=threads,
            device_name=name,
            vocab_size=vocab_size,
            rounds=rounds,
            seconds=seconds,
        )
        if file.find(row.key) is None:
            _check_memory(trial, vocab_size, device)
            open_trials.append((trial, row))
    medians: list[list[float]] = [[] for _ in open_trials]
    parameters = [0] * len(open_trials)
    for turn in range(rounds if open_trials else 0):
        for place, (trial, _) in enumerate(open_trials):
            progress(f"round {turn + 1}/{rounds}: {trial.label()}")
            model = random_model(trial, vocab_size, device)
            parameters[place] = sum(each.numel() for each in model.parameters())
            tokens = torch.randint(vocab_size, (sequences, trial.context), device=device)
            run = Pass(_Inference(model, device), [tokens], backward=False)
            run.run()  # else the first call of a slow model would be all that is timed of it
            (timing,) = time_passes([run], seconds=seconds, device=device, min_samples=1)
            medians[place].append(timing.median_ms)
            del model, run
    rows = []
    for (trial, row), found, count in zip(open_trials, medians, parameters, strict=True):
        median = statistics.median(found)
        figures: dict[str, Any] = {
            "median_ms": median,
            "low_ms": min(found),
            "high_ms": max(found),
            "tokens_per_s": sequences * trial.context / median * 1e3,
            "parameters": count,
        }
        rows.append(dataclasses.replace(row, **figures, **versions()))
    if rows:
        file.add(*rows)
    return len(rows)


class _Inference:
    def __init__(self, model: nn.Module, device: str) -> None:
        self._model, self._device = model, device

    def __call__(self, tokens: Tensor) -> Tensor:
        with mixed_precision(self._device):
            return self._model(tokens)


def random_model(trial: Trial, vocab_size: int, device: str) -> nn.Module:
    """The model of a trial, filled quickly: uniform weights of the usual spread, equal values.

    What a memory's values hold changes neither what is read nor how long that takes, and drawing
    them would take longer than the timing.
    """
    torch.manual_seed(0)
    with torch.device("meta"):
        model = build_model(trial, vocab_size, "meta")
    model.to_empty(device=device).eval()
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if not tensor.is_floating_point():
                tensor.zero_()
            elif name.endswith(".values"):
                tensor.fill_(tensor.shape[-1] ** -0.5)
            elif tensor.ndim > 1:
                bound = math.sqrt(3 / tensor.shape[-1])
                tensor.uniform_(-bound, bound)
            else:
                tensor.fill_(0.0 if name.endswith(("bias", "running_mean")) else 1.0)
    return model


def _check_memory(trial: Trial, vocab_size: int, device: str) -> None:
    with torch.device("meta"):
        model = build_model(trial, vocab_size, "meta")
    needed = 1.2 * sum(each.nbytes for each in (*model.parameters(), *model.buffers()))
    available = available_bytes(device)
    if needed > available:
        raise ValueError(
            f"{trial.label()}: needs {needed / 2**30:.1f} GiB, but {available / 2**30:.1f} GiB "
            "are available"
        )
