"""Training as in the paper (4.3): Adam, two learning rates, inverse square root, checkpoints."""

import contextlib
import dataclasses
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pkm_triton as pkm
from pkm_triton.perf.measure.ranks import Ranks
from pkm_triton.transformer import Transformer

from . import checkpoints
from .data import IGNORED, Data
from .models import build_model
from .trial import Trial

BETAS = (0.9, 0.98)


def learning_rate_factor(step: int, warmup: int) -> float:
    """The schedule of Vaswani et al.: a linear rise to 1, then the inverse square root.

    Args:
        step: counted from 1.
        warmup: steps of the rise.
    """
    return min(step / warmup, math.sqrt(warmup / step))


class Trainer:
    """A model in training.

    A step's batch depends on the seed and the step alone, so the position in the data is the
    number of steps made.

    Args:
        trial: what to train.
        data: what on.
        device: `cpu` or `cuda`; on `cuda` in mixed precision, bfloat16.
        ranks: the ranks that share each batch.
        model: the trial's model, to be trained further; by default a new one.

    Attributes:
        model: the transformer.
        step: steps made.
        seconds: time spent in `run`, before a checkpoint too.

    Raises:
        ValueError: the batch cannot be shared evenly.
    """

    def __init__(
        self,
        trial: Trial,
        data: Data,
        *,
        device: str = "cpu",
        ranks: Ranks | None = None,
        model: Transformer | None = None,
    ) -> None:
        self.trial, self.data, self.device = trial, data, device
        self.ranks = ranks or Ranks()
        if trial.batch % self.ranks.count:
            raise ValueError(
                f"batch: {trial.batch} is no multiple of the {self.ranks.count} ranks that share it"
            )
        torch.manual_seed(trial.seed)
        spread = partial(self.ranks.spread, device=device) if self.ranks.together else None
        self.model = model or build_model(trial, data.vocab_size, device, spread)
        self.step = 0
        self.seconds = 0.0
        self.ranks.share(self.model)
        self._optimisers = make_optimisers(self.model, trial)
        self._losses: list[Tensor] = []

    def train_step(self) -> Tensor:
        """Make one step; returns the loss of the batch, or of this rank's share of it."""
        self.model.train()
        inputs, targets = self.data.batch(self.step, self.ranks.rank, self.ranks.count)
        factor = learning_rate_factor(self.step + 1, self.trial.warmup)
        loss = mean_loss(self.model, inputs.to(self.device), targets.to(self.device), self.device)
        loss.backward()
        self.ranks.average_gradients(self.model)
        pkm.optim.clip_grad_norm_(self.model.parameters(), self.trial.clip)
        for optimiser in self._optimisers:
            for group in optimiser.param_groups:
                group["lr"] = group["peak_lr"] * factor
            optimiser.step()
            optimiser.zero_grad()
        self.step += 1
        return loss.detach()

    def run(
        self,
        checkpoint: Path | None = None,
        *,
        checkpoint_seconds: float = 60.0,
        stop_at: int | None = None,
        output: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> float:
        """Train to the end, or to a step, going on from a checkpoint where there is one.

        Args:
            checkpoint: file to go on from and to write, whole or not at all, every so often.
            checkpoint_seconds: time between two checkpoints.
            stop_at: step to stop at; by default the trial's last.
            output: where progress lines go; by default stderr.
            clock: the time in seconds.

        Returns:
            The mean loss of the last tenth of the steps.

        Raises:
            ValueError: the checkpoint is of another trial, or broken.
            OSError: the checkpoint cannot be written.
        """
        if checkpoint is not None and checkpoints.exists(checkpoint, self.ranks):
            self.load(checkpoint)
        end = self.trial.steps if stop_at is None else stop_at
        progress = Progress(self, sys.stderr if output is None else output, clock)
        saved = started = clock()
        spent = self.seconds
        while self.step < end:
            loss = self.train_step()
            self.seconds = spent + clock() - started
            if self.step > self._tenth():
                self._losses.append(loss)
            progress.add(loss)
            if checkpoint is not None and self.ranks.any(clock() - saved >= checkpoint_seconds):
                self.save(checkpoint)
                saved = clock()
        progress.close()
        if checkpoint is not None and end < self.trial.steps:
            self.save(checkpoint)
        return self.train_loss()

    def train_loss(self) -> float:
        """The mean loss of the last tenth of the steps, over all ranks; NaN before them."""
        if not self._losses:
            return math.nan
        return self.ranks.mean(torch.stack(self._losses).mean()).item()

    def save(self, path: Path) -> None:
        """Write all there is to go on to the same bits; all ranks call.

        Raises:
            OSError: the file cannot be written.
        """
        if self._losses:  # of all ranks, as all will read them
            own = torch.stack(self._losses)
            self._losses = list(self.ranks.mean(own).to(own.dtype))
        about = {
            "trial": dataclasses.asdict(self.trial),
            "step": self.step,
            "seconds": self.seconds,
            "losses": [loss.item() for loss in self._losses],
        }
        checkpoints.save(path, about, self.model, self._optimisers, self.ranks)

    def load(self, path: Path) -> None:
        """Go on from what `save` wrote, for as many steps more as the trial has.

        Raises:
            ValueError: the file is broken, of another trial, or further on than the trial goes.
        """
        saved = checkpoints.Saved(path, self.ranks)
        self._check(saved.about, saved.path)
        saved.restore(self.model, self._optimisers)
        self.step = saved.about["step"]
        self.seconds = saved.about["seconds"]
        self._losses = [
            torch.as_tensor(loss, device=self.device) for loss in self._of_tenth(saved.about)
        ]

    def _tenth(self) -> int:
        """The step after which the last tenth begins."""
        return self.trial.steps - max(1, self.trial.steps // 10)

    def _of_tenth(self, about: dict[str, Any]) -> list[float]:
        """A checkpoint's losses of this trial's last tenth; NaN where it was not its own's yet."""
        made, losses = max(0, about["step"] - self._tenth()), about["losses"]
        return [math.nan] * (made - len(losses)) + losses[len(losses) - min(made, len(losses)) :]

    def _check(self, about: dict[str, Any], path: Path) -> None:
        """Check what a checkpoint is of; the trial may have another number of steps."""
        ours, theirs = dataclasses.asdict(self.trial), about["trial"]
        different = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
        step = about["step"]
        if type(step) is not int or not 0 <= step <= theirs.get("steps", 0):
            raise ValueError(f"checkpoint: {str(path)!r} is broken: its step is {step!r}")
        # The learning rate of a step does not depend on how many there are.
        extended = different == ["steps"]
        if extended and step > self.trial.steps:
            raise ValueError(
                f"steps: {self.trial.steps} is less than the {step} that {str(path)!r} has made"
            )
        if different and not extended:
            raise ValueError(
                f"checkpoint: {str(path)!r} is of another configuration: "
                + ", ".join(
                    f"{name} is {theirs.get(name)} there and {ours.get(name)} here"
                    for name in different
                )
            )


def make_optimisers(model: nn.Module, trial: Trial) -> list[torch.optim.Optimizer]:
    """Adam on everything, or, with sparse gradients, pkm's SparseAdam on the memories' values."""
    rest, *values = pkm.param_groups(model, trial.lr, trial.value_lr)
    for group in (rest, *values):
        group["peak_lr"] = group["lr"]
    if trial.sparse_grad and values:
        return [
            torch.optim.Adam([rest], betas=BETAS, fused=True),
            pkm.optim.SparseAdam(values, betas=BETAS),
        ]
    return [torch.optim.Adam([rest, *values], betas=BETAS, fused=True)]


def mean_loss(model: nn.Module, inputs: Tensor, targets: Tensor, device: str) -> Tensor:
    """Mean cross-entropy over the targets that count, nats; mixed precision on a GPU."""
    with mixed_precision(device):
        logits: Tensor = model(inputs)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


def mixed_precision(device: str) -> contextlib.AbstractContextManager[Any]:
    """Autocast to bfloat16 on a GPU, nothing elsewhere."""
    if device == "cuda":
        return torch.autocast("cuda", dtype=torch.bfloat16)
    return contextlib.nullcontext()


class Progress:
    """A line of figures every few seconds, over the steps since the last one.

    They are of all ranks; usage and KL are of the reads of those steps, averaged over the memories;
    bits per byte where the data know bytes. What a step computes stays on the device until a line
    is due.
    """

    SECONDS = 10.0

    def __init__(self, trainer: Trainer, output: TextIO, clock: Callable[[], float]) -> None:
        self._trainer, self._output, self._clock = trainer, output, clock
        self._memories = contextlib.ExitStack()
        self._start()

    def _start(self) -> None:
        self._time, self._step = self._clock(), self._trainer.step
        self._loss: Tensor | None = None
        self._memories.close()
        self._usages = self._memories.enter_context(pkm.track_usage(self._trainer.model))

    def add(self, loss: Tensor) -> None:
        """A step was made."""
        self._loss = loss if self._loss is None else self._loss + loss
        done = self._trainer.step == self._trainer.trial.steps
        if self._trainer.ranks.any(done or self._clock() - self._time >= self.SECONDS):
            self._print()
            self._start()

    def close(self) -> None:
        """Count reads no longer."""
        self._memories.close()

    def _print(self) -> None:
        trainer, trial = self._trainer, self._trainer.trial
        if self._loss is None:
            return
        steps = trainer.step - self._step
        loss = trainer.ranks.mean(self._loss).item() / steps
        usages = list(self._usages.values())
        if trainer.ranks.count > 1:
            for each in usages:
                each.all_reduce()
        if trainer.ranks.rank:
            return
        seconds = max(self._clock() - self._time, 1e-9)
        parts = [f"step {trainer.step}/{trial.steps}", f"loss {loss:.4f}"]
        tokens = steps * trial.batch * trial.context
        num_bytes = sum(
            trainer.data.num_bytes(trainer.data.batch(step)[1])
            for step in range(self._step, trainer.step)
        )
        if num_bytes:
            parts.append(f"{loss * tokens / num_bytes / math.log(2):.4f} bits/byte")
        parts.append(f"{tokens / seconds:,.0f} tokens/s")
        if usages:
            usage = sum(each.usage().item() for each in usages) / len(usages)
            kl = sum(each.kl().item() for each in usages) / len(usages)
            parts.append(f"usage {usage:.1%}, KL {kl:.2f}")
        print(f"{trial.label()}: {'  '.join(parts)}", file=self._output, flush=True)
