"""Repeat one of the paper's studies: train its models, time them, make its tables and figures.

A study that was stopped goes on where it was when the same command is given again. Under torchrun
every batch is shared by all ranks.
"""

import argparse
import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pkm_triton.perf.measure.ranks import Ranks, add_rank_arguments, ranks_of_torchrun
from pkm_triton.perf.records.environment import check_seed, check_threads, resolve_device
from pkm_triton.perf.records.files import ensure_writable, write_whole
from pkm_triton.perf.records.row_file import RowFile
from pkm_triton.perf.report.plot_style import save

from . import curves, depth, facts, forgetting, heads_topk, keys, memory_size, position
from .presets import PRESETS, Preset
from .records import TimedRow, TrainedRow
from .runner import TRAINED_CSV, train_trials
from .summary import Results, Study
from .text import SOURCES, Text, read_text
from .timing import time_models
from .trial import Trial, parse_settings, vocab_size_of

TIMED_CSV = "timed.csv"
STAGES = ("train", "time", "report")
STUDIES: dict[str, Study] = {
    "memory-size": memory_size,
    "position": position,
    "heads-topk": heads_topk,
    "keys": keys,
    "curves": curves,
    "depth": depth,
    "facts": facts,
    "forgetting": forgetting,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `pkm-perf study`."""
    parser.add_argument("name", help=f"the study: {', '.join(STUDIES)}")
    parser.add_argument(
        "--preset", default="small", help=f"the sizes: {', '.join(PRESETS)} (default: %(default)s)"
    )
    parser.add_argument(
        "--text",
        help=f"a file, a folder, or one of {', '.join(SOURCES)} (default: the first installed)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("study-output"),
        help="folder for the studies, each in a folder of its name (default: %(default)s)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="N", help="seeds")
    add_rank_arguments(parser)
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all)")
    parser.add_argument(
        "--stages",
        nargs="+",
        default=list(STAGES),
        metavar="STAGE",
        help="what to do, of train, time, report (default: all three)",
    )
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="FIELD=VALUE",
        help="change the model or its training in all trials, as steps=500",
    )


def run(arguments: argparse.Namespace) -> int:
    """Check everything, do the stages, and say what was written.

    Raises:
        ValueError: an argument is not allowed, the text cannot be used, the folder cannot be
            written, or its CSV is of another version. Nothing has been trained or written then.
        OSError: a file could not be written; everything that was finished is in the CSVs.
    """
    study = _one_of("study", arguments.name, STUDIES)
    preset = _one_of("preset", arguments.preset, PRESETS)
    for stage in arguments.stages:
        _one_of("stages", stage, dict.fromkeys(STAGES))
    if len(set(arguments.seeds)) < len(arguments.seeds):
        raise ValueError(f"seeds: {arguments.seeds} are not allowed; give each once")
    for seed in arguments.seeds:
        check_seed(seed)
    device = resolve_device(arguments.device)
    threads = torch.get_num_threads()
    if arguments.threads is not None:
        threads = check_threads(arguments.threads)
    changed = parse_settings(arguments.set)
    folder: Path = arguments.output / arguments.name
    base = dataclasses.replace(preset.base(arguments.name), **changed)
    _check_changed(changed, arguments.name, study, preset, base)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with ranks_of_torchrun(device, arguments.shard, arguments.timeout) as ranks:
            return _run(arguments, study, preset, base, folder, device, ranks)
    except KeyboardInterrupt:
        print(
            f"\nStopped; what was finished is in {folder}. The same command goes on from there.",
            file=sys.stderr,
        )
        return 130
    finally:
        torch.set_num_threads(before)


def _run(
    arguments: argparse.Namespace,
    study: Study,
    preset: Preset,
    base: Trial,
    folder: Path,
    device: str,
    ranks: Ranks,
) -> int:
    text: Text | None = None
    if base.task == "text" and ("train" in arguments.stages or arguments.text is not None):
        text = read_text(arguments.text)
        base = dataclasses.replace(
            base, text=text.name, text_size=text.size, text_sha256=text.sha256
        )
        if "train" in arguments.stages:
            text.split()  # refuses too few documents before anything is written
    trials = [
        trial
        for seed in arguments.seeds
        for trial in study.trials(preset, dataclasses.replace(base, seed=seed))
    ]
    ensure_writable(folder)
    trained = RowFile(folder / TRAINED_CSV, TrainedRow)
    timed = RowFile(folder / TIMED_CSV, TimedRow)
    if "train" in arguments.stages:
        neighbours = sorted(folder.parent.glob(f"*/{TRAINED_CSV}"))
        count = train_trials(
            trials,
            trained,
            text,
            device=device,
            ranks=ranks,
            neighbours=[path for path in neighbours if path.parent != folder],
        )
        if ranks.rank == 0:
            print(f"{count} models trained, {len(trials) - count} were there already")
    if ranks.rank:
        return 0
    models = study.timed(preset, base)
    if models and "time" in arguments.stages:
        count = time_models(
            models,
            timed,
            vocab_size=vocab_size_of(base.tokens),
            sequences=max(1, preset.timed_tokens // base.context),
            seconds=preset.seconds,
            rounds=preset.rounds,
            device=device,
        )
        print(f"{count} models timed")
    if "report" in arguments.stages:
        for path in write_report(study, Results(trained.rows, timed.rows), preset, base, folder):
            print(path)
    return 0


def write_report(
    study: Study, results: Results, preset: Preset, base: Trial, folder: Path
) -> list[Path]:
    """Write the table and the figures that the rows suffice for; returns the files written.

    Of the text that `base` names, or that of the last row where it names none.
    """
    if base.task == "text" and not base.text_sha256 and results.trained:
        last = results.trained[-1]
        base = dataclasses.replace(
            base, text=last.text, text_size=last.text_size, text_sha256=last.text_sha256
        )
    results = results.of(study.trials(preset, base), study.timed(preset, base))
    report = study.report(results, preset, base)
    if not report.sections:
        return []
    path = folder / "table.md"
    machine = _machine(results)
    write_whole(path, "\n\n".join([f"# {study.TITLE}", *report.sections, machine]) + "\n")
    written = [path]
    for name, figure in report.figures.items():
        written += save(figure, folder / name)
    return written


def _check_changed(
    changed: Mapping[str, Any], name: str, study: Study, preset: Preset, base: Trial
) -> None:
    """Every setting changes some model of the study: none is what its models differ in."""

    def models(trial: Trial) -> list[Trial]:
        seeded = dataclasses.replace(trial, seed=0)
        return [*study.trials(preset, seeded), *study.timed(preset, seeded)]

    for field, value in changed.items():
        usual = getattr(preset.base(name), field)
        try:
            without = models(dataclasses.replace(base, **{field: usual}))
        except ValueError:  # another setting needs this one
            continue
        if value != usual and without == models(base):
            raise ValueError(
                f"set: '{field}={value}' changes nothing in {name}, which sets {field} itself"
            )


def _machine(results: Results) -> str:
    """What was run where, on what."""
    parts = []
    if results.trained:
        row = results.trained[-1]
        parts.append(
            f"Trained on {row.device_name}; torch {row.torch_version}, pkm_triton "
            f"{row.pkm_triton_version}."
        )
        if row.text_sha256:
            parts.append(f"Text: {row.text}, {row.text_size:,} bytes, sha256 {row.text_sha256}.")
    if results.timed:
        row = results.timed[-1]
        parts.append(
            f"Timed on {row.device_name}, {row.threads} thread{'s' * (row.threads > 1)}, "
            f"{row.sequences * row.context:,} tokens in a call, random weights; median of "
            f"{row.rounds} interleaved rounds."
        )
    return " ".join(parts)


def _one_of(name: str, value: str, allowed: Mapping[str, Any]) -> Any:
    if value not in allowed:
        raise ValueError(f"{name}: {value!r} is unknown; allowed: {', '.join(allowed)}")
    return allowed[value]
