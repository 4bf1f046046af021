"""Train one language model with memories on a text, and save it.

A training that was stopped goes on where it was when the same command is given again, and one that
is done goes on when it is given with more steps (--set steps=...). Under
torchrun every batch is shared by all ranks: torchrun --nproc-per-node 2 -m pkm_triton.perf train
With --shard the memories' values lie over the ranks, and the checkpoint is a folder.
"""

import argparse
import dataclasses
import math
import sys
from pathlib import Path

import torch

from pkm_triton.checkpoints import save_with_memory
from pkm_triton.perf.measure.ranks import Ranks, add_rank_arguments, ranks_of_torchrun
from pkm_triton.perf.measure.reads import write_shares
from pkm_triton.perf.records.environment import check_seed, check_threads, resolve_device
from pkm_triton.perf.records.files import ensure_writable

from .data import make_data
from .evaluation import evaluate
from .popularity import shares_of
from .presets import PRESETS
from .text import SOURCES, read_text
from .training import Trainer
from .trial import TEXT_FIELDS, Trial, parse_settings

CHECKPOINT, MODEL, READS = "checkpoint.pt", "model.pt", "reads.csv"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `pkm-perf train`."""
    parser.add_argument(
        "--preset", default="small", help=f"the sizes: {', '.join(PRESETS)} (default: %(default)s)"
    )
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="FIELD=VALUE",
        help="change a size or a setting: "
        + ", ".join(
            field.name for field in dataclasses.fields(Trial) if field.name not in TEXT_FIELDS
        ),
    )
    parser.add_argument(
        "--text",
        help=f"a file, a folder, or one of {', '.join(SOURCES)} (default: the first installed)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("train-output"),
        help=f"folder for {CHECKPOINT}, {MODEL} and {READS}, how unevenly slots are read "
        "(default: %(default)s)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")
    add_rank_arguments(parser)
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all)")
    parser.add_argument(
        "--checkpoint-seconds",
        type=float,
        default=60.0,
        metavar="S",
        help="time between two checkpoints (default: %(default)s)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Train, evaluate and save.

    Raises:
        ValueError: an argument is not allowed, the text cannot be used, or the folder holds the
            checkpoint of another configuration. Nothing has been trained then.
        OSError: a file could not be written; the last checkpoint is there.
    """
    if arguments.preset not in PRESETS:
        raise ValueError(f"preset: {arguments.preset!r} is unknown; allowed: {', '.join(PRESETS)}")
    trial = dataclasses.replace(PRESETS[arguments.preset].text, **parse_settings(arguments.set))
    if trial.tuning:
        raise ValueError(f"tuning: {trial.tuning!r} is what pkm-perf study forgetting does")
    if not arguments.checkpoint_seconds >= 0:
        raise ValueError(
            f"checkpoint-seconds: {arguments.checkpoint_seconds} is not allowed; at least 0"
        )
    device = resolve_device(arguments.device)
    before = torch.get_num_threads()
    threads = before if arguments.threads is None else check_threads(arguments.threads)
    check_seed(trial.seed)
    torch.set_num_threads(threads)
    try:
        with ranks_of_torchrun(device, arguments.shard, arguments.timeout) as ranks:
            return _train(arguments, trial, device, ranks)
    except KeyboardInterrupt:
        path = arguments.output / CHECKPOINT
        goes_on = f"goes on from {path}" if path.exists() else "starts anew: there is no checkpoint"
        print(f"\nStopped; the same command {goes_on}.", file=sys.stderr)
        return 130
    finally:
        torch.set_num_threads(before)


def _train(arguments: argparse.Namespace, trial: Trial, device: str, ranks: Ranks) -> int:
    text = None
    if trial.task == "text":
        text = read_text(arguments.text)
        trial = dataclasses.replace(
            trial, text=text.name, text_size=text.size, text_sha256=text.sha256
        )
    trainer = Trainer(trial, make_data(trial, text), device=device, ranks=ranks)
    folder: Path = arguments.output
    ensure_writable(folder)
    trainer.run(folder / CHECKPOINT, checkpoint_seconds=arguments.checkpoint_seconds)
    trainer.save(folder / CHECKPOINT)
    if ranks.rank == 0 or ranks.together:
        save_with_memory(trainer.model, folder / MODEL)
        figures = dataclasses.asdict(evaluate(trainer.model, trainer.data, device))
        shares = shares_of(trainer.model, trainer.data, device)
        if ranks.rank == 0:
            _tell(figures, shares, folder)
    ranks.wait()
    return 0


def _tell(
    figures: dict[str, float], shares: list[tuple[float, float]] | None, folder: Path
) -> None:
    # What does not exist is NaN; a loss that is has diverged.
    known = {
        name: value for name, value in figures.items() if name == "loss" or not math.isnan(value)
    }
    print("test set: " + ", ".join(f"{name} {value:.4g}" for name, value in known.items()))
    print(folder / MODEL)
    if shares is not None:
        write_shares(folder / READS, shares)
        print(folder / READS)
