import dataclasses
import errno
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from pkm_triton.perf.__main__ import main
from pkm_triton.perf.records.row_file import RowFile, read_rows
from pkm_triton.perf.report import paper
from pkm_triton.perf.studies import command
from pkm_triton.perf.studies.command import STUDIES, write_report
from pkm_triton.perf.studies.presets import PRESETS
from pkm_triton.perf.studies.records import TimedRow, TrainedRow
from pkm_triton.perf.studies.runner import TRAINED_CSV
from pkm_triton.perf.studies.summary import Cell, Results


@pytest.fixture
def source(text, tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"\n".join(text.documents))
    return path


@pytest.mark.parametrize("name", list(STUDIES))
def test_a_study_runs_end_to_end(name, source, tmp_path, capsys):
    arguments = ["study", name, "--preset", "tiny", "--text", str(source), "--device", "cpu"]
    arguments += ["--output", str(tmp_path / "out"), "--seeds", "0", "1", "--threads", "1"]
    started = time.monotonic()
    assert main(arguments) == 0
    assert time.monotonic() - started < 60
    printed = capsys.readouterr().out
    folder = tmp_path / "out" / name
    stem = name.replace("-", "_")
    names = {"trained.csv", "table.md", f"{stem}.png", f"{stem}.svg"}
    if name not in ("position", "curves", "forgetting"):
        names.add("timed.csv")
    assert {path.name for path in folder.iterdir()} == names
    rows = read_rows(folder / TRAINED_CSV, TrainedRow)
    assert {row.seed for row in rows} == {0, 1}
    assert f"{len(rows)} models trained, 0 were there already" in printed
    table = (folder / "table.md").read_text()
    assert table.startswith(f"# {STUDIES[name].TITLE}")
    assert "2 seeds" in table
    if name not in ("facts", "forgetting"):
        assert "The paper's own" in table
        assert "Text: text.txt" in table
    before = (folder / TRAINED_CSV).read_text()
    (folder / "table.md").unlink()
    assert main([*arguments, "--stages", "report"]) == 0
    assert (folder / "table.md").read_text() == table
    assert main(arguments) == 0
    assert f"0 models trained, {len(rows)} were there already" in capsys.readouterr().out
    assert (folder / TRAINED_CSV).read_text() == before


@pytest.mark.parametrize("preset", list(PRESETS))
@pytest.mark.parametrize("name", list(STUDIES))
def test_every_preset_makes_trials(name, preset):
    study, sizes = STUDIES[name], PRESETS[preset]
    trials = study.trials(sizes, sizes.base(name))
    assert len(trials) == len(set(trials)) >= 2


def test_the_papers_preset_has_the_papers_sizes():
    preset = PRESETS["paper"]
    base = preset.text
    assert (base.layers, base.attention_heads, base.memory_layers) == (6, 8, "5")
    assert (base.heads, base.top_k, base.num_slots, base.query_dim) == (4, 32, 512**2, 512)
    assert (base.lr, base.value_lr, base.query_norm) == (2.5e-4, 1e-3, "batch")
    assert preset.sizes == paper.TABLE_2_NUM_SUBKEYS
    grid = {(trial.dim, trial.layers, trial.memory_layers)
            for trial in STUDIES["depth"].trials(preset, base)}  # fmt: skip
    assert (1024, 16, "6+12") in grid
    assert len(grid) == sum(len(row) for rows in paper.TABLE_1.values() for row in rows.values())


def test_what_studies_share_is_the_same_trial():
    preset = PRESETS["small"]
    sets = {name: set(STUDIES[name].trials(preset, preset.base(name))) for name in STUDIES}
    assert len(sets["keys"] & sets["memory-size"]) == len(preset.sizes)
    assert sets["position"] & sets["memory-size"] & sets["heads-topk"]


def a_row(trial, **figures):
    defaults = {"loss": 3.0, "perplexity": 20.0, "bits_per_byte": 2.0, "usage": 0.5, "kl": 1.0}
    defaults |= {"recall": 0.5, "reads_per_slot": 90.0, "device_name": "some CPU"}
    return TrainedRow(**dataclasses.asdict(trial), **{**defaults, **figures})


def cells(table, name):
    (line,) = [line for line in table.splitlines() if line.startswith(f"| {name}")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def cells_of_first(table, name):
    return cells(next(line for line in table.splitlines() if line.startswith(f"| {name}")), name)


def test_the_table_has_the_rows_figures_beside_the_papers(tmp_path):
    preset = PRESETS["small"]
    study = STUDIES["memory-size"]
    rows = [
        a_row(trial, perplexity=10 + place + seed, usage=place / 100 + seed / 1000)
        for seed in (0, 1)
        for place, trial in enumerate(
            study.trials(preset, dataclasses.replace(preset.text, seed=seed))
        )
    ]
    write_report(study, Results(rows, []), preset, preset.text, tmp_path)
    table = (tmp_path / "table.md").read_text()
    ours, theirs = table.split("The paper's own")
    # The three models without a memory come first, then no norm and norm in turn.
    assert cells(ours, "perplexity, batch norm")[0] == "14.50 ±0.50"
    assert cells(ours, "KL, no batch norm")[1] == "1.00 ±0.00"
    assert cells(theirs, "perplexity, batch norm")[-1] == "18.0"
    assert cells(theirs, "usage (%), no batch norm")[-1] == "25.8"
    assert "no memory, " in ours


def test_a_report_is_of_the_text_and_the_seeds_that_are_asked_for(tmp_path):
    preset, study = PRESETS["tiny"], STUDIES["position"]

    def trained(text, seed, steps=6):
        base = dataclasses.replace(
            preset.text, text=text, text_sha256=text, text_size=1, seed=seed, steps=steps
        )
        return [a_row(trial, perplexity=len(text)) for trial in study.trials(preset, base)]

    rows = [*trained("one", 0), *trained("one", 1), *trained("three", 0), *trained("three", 1, 7)]
    for text, seeds in (("one", "2 seeds a point"), ("three", "1 seed a point")):
        base = dataclasses.replace(preset.text, text=text, text_sha256=text, text_size=1)
        write_report(study, Results(rows, []), preset, base, tmp_path)
        table = (tmp_path / "table.md").read_text()
        assert f"Text: {text}, 0.0 MB. {seeds}." in table
        assert f"Text: {text}, 1 bytes" in table
        assert cells_of_first(table, "perplexity")[0].startswith(f"{len(text)}.00")
    assert cells(table.partition("own:")[2], "perplexity")[0] == "21.5"


def test_a_cell_is_the_mean_over_seeds(trial):
    cell = Cell([a_row(trial, perplexity=10.0), a_row(trial, perplexity=20.0)])
    assert cell.mean("perplexity") == 15
    assert cell.ends("perplexity") == (10, 20)
    assert cell.text("perplexity", ".1f") == "15.0 ±5.0"
    assert Cell(cell.rows[:1]).text("perplexity", ".1f") == "10.0"
    nothing = Cell([a_row(trial, usage=float("nan"))])
    assert nothing.text("usage", ".1f") == "–"


def test_curves_show_every_kind_at_every_length(tmp_path):
    preset = PRESETS["small"]
    study = STUDIES["curves"]
    rows = [
        a_row(trial, perplexity=10 + trial.fixed_keys + trial.steps / 1e4, usage=0.5)
        for trial in study.trials(preset, preset.text)
    ]
    write_report(study, Results(rows, []), preset, preset.text, tmp_path)
    table = (tmp_path / "table.md").read_text()
    assert "0.819 M tokens" in table
    assert "16.4 M tokens" in table
    assert cells_of_first(table, "product keys, 4k slots")[-1] == "10.80"
    assert cells_of_first(table, "flat keys, fixed, 4k slots")[0] == "11.04"
    assert cells_of_first(table, "flat keys, 16k slots")[0] == "10.04"
    assert "fixed, 16k" not in table


def test_curves_compare_flat_with_product_keys_of_the_same_seed(tmp_path):
    preset, study = PRESETS["tiny"], STUDIES["curves"]
    rows = [
        a_row(trial, perplexity=(1 + seed) * (98 + seed if trial.keys == "flat" else 100))
        for seed in (1, 0)
        for trial in study.trials(preset, dataclasses.replace(preset.text, seed=seed))
        if not (seed == 0 and trial.keys == "product" and trial.steps == 6)
    ]
    write_report(study, Results(rows, []), preset, preset.text, tmp_path)
    above = (tmp_path / "table.md").read_text().partition("Perplexity of flat keys above")[2]
    assert cells_of_first(above, "flat keys, 16 slots") == ["-2.0, -1.0", "-2.0, -1.0", "-1.0"]


def test_a_report_of_no_rows_writes_nothing(tmp_path):
    preset = PRESETS["tiny"]
    for name, study in STUDIES.items():
        assert write_report(study, Results([], []), preset, preset.base(name), tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_the_same_rows_make_the_same_pictures(tmp_path):
    preset, study = PRESETS["tiny"], STUDIES["keys"]
    rows = [a_row(trial) for trial in study.trials(preset, preset.text)]
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_report(study, Results(rows, []), preset, preset.text, tmp_path / folder)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


TINY = ["--preset", "tiny", "--device", "cpu", "--threads", "1"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "study: 'nothing' is unknown; allowed: memory-size, position"),
        (["keys", "--preset", "big"], "preset: 'big' is unknown; allowed: tiny, small, paper"),
        (["keys", "--stages", "plot"], "stages: 'plot' is unknown; allowed: train, time, report"),
        (["keys", "--seeds", "-1"], "seed: -1 is not allowed"),
        (["keys", "--seeds", "1", "1"], "seeds: [1, 1] are not allowed"),
        (["keys", "--threads", "0"], "threads: 0 is not allowed; 1 to "),
        (["keys", "--threads", "1000000"], "threads: 1000000 is not allowed; 1 to "),
        (["keys", "--seeds", str(2**70)], f"seed: {2**70} is not allowed"),
        (["keys", "--device", "tpu"], "device: 'tpu' is unknown"),
        (["keys", "--set", "speed=9"], "set: 'speed=9' is not allowed"),
        (["keys", "--set", "memory_layers=9"], "memory_layers: layer 9 does not exist"),
        (["forgetting", "--set", "tuning_facts=0"], "tuning_facts: 0 is too small"),
        (["keys", "--set", "text=novel"], "set: 'text=novel' is not allowed"),
        (["keys", "--set", "steps=9", "seed=4"], "set: 'seed=4' changes nothing in keys"),
        (["memory-size", "--set", "num_subkeys=6"], "'num_subkeys=6' changes nothing in memory-s"),
        (["memory-size", "--set", "query_norm=none"], "'query_norm=none' changes nothing in memo"),
        (["position", "--set", "memory_layers=1"], "'memory_layers=1' changes nothing in positio"),
        (["curves", "--set", "steps=9"], "set: 'steps=9' changes nothing in curves, which sets"),
        (["keys", "--text", "/nowhere"], "text: '/nowhere' is neither"),
    ],
)
def test_a_mistake_is_one_clear_line_and_nothing_is_written(arguments, message, tmp_path, capsys):
    folder = tmp_path / "out"
    name, *rest = arguments
    assert main(["study", name, *TINY, "--output", str(folder), *rest]) == 2
    error = capsys.readouterr().err
    assert error.startswith("pkm-perf: ")
    assert message in error
    assert error.count("\n") == 1
    assert not folder.exists()


def test_too_few_documents_are_refused_before_anything_is_written(tmp_path, capsys):
    (tmp_path / "text").write_text("only one")
    arguments = ["--text", str(tmp_path / "text"), "--output", str(tmp_path / "out")]
    assert main(["study", "keys", *TINY, *arguments]) == 2
    assert "has 1 documents, too few to split" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"", b"\0\1\2", b"too short"], ids=["empty", "binary", "one"])
def test_a_text_that_is_none_is_one_clear_line(content, tmp_path, capsys):
    (tmp_path / "text").write_bytes(content)
    arguments = ["study", "keys", *TINY, "--text", str(tmp_path / "text")]
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "text: 'text" in error or "text: '/" in error
    assert error.count("\n") == 1


def test_an_unwritable_folder_and_another_version_are_said_before_training(
    source, tmp_path, capsys, monkeypatch
):
    def never(*_, **__):
        raise AssertionError("trained although it must not")

    monkeypatch.setattr(command, "train_trials", never)
    (tmp_path / "file").write_text("")
    arguments = ["study", "keys", *TINY, "--text", str(source), "--output"]
    assert main([*arguments, str(tmp_path / "file")]) == 2
    assert "output: cannot write in" in capsys.readouterr().err
    folder = tmp_path / "out" / "keys"
    folder.mkdir(parents=True)
    (folder / TRAINED_CSV).write_text("schema\n99\n")
    assert main([*arguments, str(tmp_path / "out")]) == 2
    assert "schema version 99" in capsys.readouterr().err


def test_a_full_disk_is_one_clear_line_and_no_row_is_lost(source, tmp_path, capsys, monkeypatch):
    arguments = ["study", "keys", *TINY, "--text", str(source), "--stages", "train"]
    arguments += ["--output", str(tmp_path)]
    assert main([*arguments, "--seeds", "0"]) == 0
    path = tmp_path / "keys" / TRAINED_CSV
    before = path.read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    capsys.readouterr()
    monkeypatch.setattr(os, "fsync", full)
    assert main([*arguments, "--seeds", "0", "1"]) == 1
    (error,) = [line for line in capsys.readouterr().err.splitlines() if "pkm-perf" in line]
    assert error == f"pkm-perf: [Errno 28] No space left on device: {str(path)!r}"
    assert path.read_bytes() == before


@pytest.mark.slow
def test_a_killed_study_goes_on_to_the_same_figures(source, tmp_path):
    run = [sys.executable, "-m", "pkm_triton.perf", "study", "keys", *TINY]
    run += ["--text", str(source), "--stages", "train", "--set", "steps=60", "--output"]
    subprocess.run([*run, str(tmp_path / "whole")], check=True, capture_output=True)
    whole = read_rows(tmp_path / "whole" / "keys" / TRAINED_CSV, TrainedRow)
    path = tmp_path / "cut" / "keys" / TRAINED_CSV
    for least in (1, 2):
        with subprocess.Popen([*run, str(tmp_path / "cut")], stderr=subprocess.DEVNULL,
                              stdout=subprocess.DEVNULL) as running:  # fmt: skip
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline and running.poll() is None:
                if path.exists() and len(read_rows(path, TrainedRow)) >= least:
                    break
                time.sleep(0.01)
            os.kill(running.pid, signal.SIGKILL)
        assert len(read_rows(path, TrainedRow)) >= least
    subprocess.run([*run, str(tmp_path / "cut")], check=True, capture_output=True)
    cut = RowFile(path, TrainedRow)
    assert len(cut.rows) == len(whole) == 3
    for row in whole:
        found = cut.find(row.key)
        assert (found.loss, found.usage, found.kl) == (row.loss, row.usage, row.kl)


def test_train_saves_a_model_that_loads(source, tmp_path, capsys):
    from pkm_triton.perf.studies.models import build_model
    from pkm_triton.transformer import load_with_memory

    arguments = ["train", "--preset", "tiny", "--text", str(source), "--threads", "1"]
    arguments += ["--output", str(tmp_path / "out"), "--device", "cpu", "--set", "steps=5"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert re.search(r"perplexity [\d.]+, bits_per_byte [\d.]+, usage [\d.]+, kl [\d.]+", printed)
    trial = dataclasses.replace(PRESETS["tiny"].text, memory_layers="")
    load_with_memory(build_model(trial, 256), tmp_path / "out" / "model.pt")
    # The same command finds the training finished; another configuration is refused.
    assert main(arguments) == 0
    assert capsys.readouterr().out == printed
    assert main([*arguments, "lr=0.5"]) == 2
    assert "another configuration: lr is 0.002 there and 0.5 here" in capsys.readouterr().err
    assert main([*arguments[:-1], "memory_layers=7"]) == 2
    assert main(["train", "--preset", "huge"]) == 2


def test_speeds_of_a_table_are_of_one_call(tmp_path):
    preset, study = PRESETS["tiny"], STUDIES["depth"]
    shallow, *_, deep = study.timed(preset, preset.text)

    def timed(trial, rate, threads):
        fields = dataclasses.asdict(trial.architecture()) | {"threads": threads}
        times = {"median_ms": 1.0, "low_ms": 1.0, "high_ms": 1.0, "tokens_per_s": rate}
        return TimedRow(**fields, **times, device_name="some CPU")

    other = dataclasses.replace(deep, dim=8, layers=9)
    rows = [timed(shallow, 11.0, 1), timed(shallow, 22.0, 2), timed(deep, 33.0, 1)]
    write_report(study, Results([], [*rows, timed(other, 44.0, 4)]), preset, preset.text, tmp_path)
    table = (tmp_path / "table.md").read_text()
    assert "| 11 |" in table
    assert "| 33 |" in table
    assert "22" not in table
    assert "Timed on some CPU, 1 thread, " in table


def test_timed_rows_stand_in_the_tables(tmp_path):
    preset, study = PRESETS["tiny"], STUDIES["depth"]
    rows = [a_row(trial) for trial in study.trials(preset, preset.text)]
    timed = [
        TimedRow(
            **dataclasses.asdict(trial.architecture()), tokens_per_s=1234.0, device_name="some CPU"
        )
        for trial in study.timed(preset, preset.text)
    ]
    write_report(study, Results(rows, timed), preset, preset.text, tmp_path)
    assert "1,234" in (tmp_path / "table.md").read_text()
    assert (tmp_path / "depth.png").exists()
