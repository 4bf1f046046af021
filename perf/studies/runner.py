"""Train the models of a study, each recorded as soon as it is done."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pkm_triton as pkm
from pkm_triton.perf.measure.ranks import Ranks
from pkm_triton.perf.records.environment import device_name, versions
from pkm_triton.perf.records.row_file import RowFile, read_rows

from . import checkpoints
from .data import make_data
from .evaluation import evaluate
from .records import TrainedRow
from .text import Text
from .training import Trainer
from .trial import Trial
from .tuning import tune

TRAINED_CSV = "trained.csv"


def train_trials(
    trials: Sequence[Trial],
    file: RowFile[TrainedRow],
    text: Text | None,
    *,
    device: str = "cpu",
    ranks: Ranks | None = None,
    checkpoint_seconds: float = 60.0,
    neighbours: Iterable[Path] = (),
    progress: Callable[[str], None] = print,
) -> int:
    """Train the trials that `file` does not hold yet, and add a row for each.

    A trial that is cut off goes on from its checkpoint, which lies beside the file; one that has
    more steps than another, and nothing else that differs, goes on from that one's, if it comes
    after it; a tuning starts from the checkpoint of what it tunes. All data are made before
    anything is trained, so that what is wrong with them is said at once.

    Args:
        trials: what to train.
        file: where rows are added, by rank 0.
        text: what the trials name, if any does.
        device: `cpu` or `cuda`.
        ranks: those that share the work.
        checkpoint_seconds: time between two checkpoints.
        neighbours: CSVs of other studies; a trial that one of them holds is taken from there.
        progress: is told what is done.

    Returns:
        The number of trials trained.

    Raises:
        ValueError: the data cannot be made, a batch cannot be shared, a tuning cannot be sharded,
            or a checkpoint is of another configuration.
        OSError: a file cannot be written; every trial that was done is in `file`.
    """
    ranks = ranks or Ranks()
    known = {row.key: row for path in neighbours for row in read_rows(path, TrainedRow)}
    taken = [known[trial.key] for trial in trials if trial.key in known]
    taken = [row for row in taken if file.find(row.key) is None]
    if taken and ranks.rank == 0:
        file.add(*taken)
    have = {row.key for row in (*file.rows, *taken)}
    todo = [trial for trial in dict.fromkeys(trials) if trial.key not in have]
    for trial in todo:
        if ranks.together and trial.tuned_by[0] == "slots":
            raise ValueError(
                f"shard: {ranks.layout!r} is not possible with tuning {trial.tuning!r}, which "
                "trains some slots of a whole table"
            )
        make_data(trial, text)
    ranks.wait()  # until all have read what rank 0 is about to add to
    for number, trial in enumerate(todo, start=1):
        if ranks.rank == 0:
            progress(f"{number}/{len(todo)}: {trial.label()}")
        checkpoint = file.path.parent / "checkpoints" / f"{_training_of(trial).name}.pt"
        goes_on = _training_of(trial) in map(_training_of, todo[number:])
        row = train_trial(
            trial,
            text,
            checkpoint,
            device=device,
            ranks=ranks,
            checkpoint_seconds=checkpoint_seconds,
            keep=goes_on,
        )
        if ranks.rank == 0:
            file.add(row)
            if not goes_on:
                checkpoints.remove(checkpoint)
                with contextlib.suppress(OSError):  # others of this folder are trained still
                    checkpoint.parent.rmdir()
        ranks.wait()
    return len(todo)


def train_trial(
    trial: Trial,
    text: Text | None,
    checkpoint: Path,
    *,
    device: str,
    ranks: Ranks,
    checkpoint_seconds: float,
    keep: bool,
) -> TrainedRow:
    """Train one trial and evaluate it, on rank 0; the row of the other ranks has no figures.

    With `keep` the checkpoint is written at the end too, for another trial to go on from.
    """
    first = trial.before_tuning()
    trainer = Trainer(first, make_data(first, text), device=device, ranks=ranks)
    before = trainer.data
    trainer.run(checkpoint, checkpoint_seconds=checkpoint_seconds)
    if keep:
        trainer.save(checkpoint)
    if trial.tuning:
        trainer = tune(trainer, trial, ranks)
    train_loss = trainer.train_loss()
    row = TrainedRow(**dataclasses.asdict(trial))
    if ranks.rank and not ranks.together:
        return row
    model = trainer.model
    figures = dataclasses.asdict(evaluate(model, trainer.data, device))
    if trial.tuning:
        tuned = [each.numel() for each in model.parameters() if each.requires_grad]
        figures["kept"] = evaluate(model, before, device).recall
        figures["tuned_parameters"] = sum(tuned)
    memories = [
        module
        for module in model.modules()
        if isinstance(module, pkm.ProductKeyMemory | pkm.FlatKeyMemory)
    ]
    return dataclasses.replace(
        row,
        **figures,
        **versions(),
        train_loss=train_loss,
        train_tokens=trainer.trial.steps * trial.batch * trial.context,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        memory_parameters=sum(each.numel() for layer in memories for each in layer.parameters()),
        seconds=trainer.seconds,
        device_name=device_name(device),
    )


def _training_of(trial: Trial) -> Trial:
    """The trial but for its steps, on whose number no learning rate depends, and its tuning."""
    return dataclasses.replace(trial.before_tuning(), steps=1)
