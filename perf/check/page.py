"""A report as a Markdown page and as lines on a terminal. Imports nothing of torch."""

from .outcome import INFO, MEASURED, Line, Report, counts


def markdown(report: Report) -> str:
    """A page to be pasted into an issue: the verdict, the machine, and a line for each check."""
    summary = ", ".join(f"{count} {name}" for name, count in counts(report.lines).items())
    parts = [f"# pkm-perf check: {report.verdict}", f"{summary}."]
    if report.failed:
        failed = "\n".join(f"- {line.group}: {line.name}" for line in report.failed)
        parts.append(f"Failed:\n\n{failed}")
    machine = [f"| {name} | {_cell(value)} |" for name, value in report.machine.items() if value]
    parts.append("\n".join(["| machine | |", "| --- | --- |", *machine]))
    for group in dict.fromkeys(line.group for line in report.lines):
        lines = [line for line in report.lines if line.group == group]
        parts.append(f"## {group}")
        parts.append(_measurements(lines) if group == MEASURED else _checks(lines))
    if report.compiled:
        parts += ["## Compiling", _compiled(report.compiled)]
    parts.append(
        "Errors are the largest against float64; allowed is twice that of PyTorch in the same "
        "precision, plus what rounding alone may cost."
    )
    return "\n\n".join(parts) + "\n"


def _checks(lines: list[Line]) -> str:
    rows = ["| check | | error | allowed | |", "| --- | --- | ---: | ---: | --- |"]
    for line in lines:
        outcome = line.outcome
        rows.append(
            f"| {_cell(line.name)} | {outcome.status} | {_number(outcome.error)} | "
            f"{_number(outcome.allowed)} | {_cell(outcome.note)} |"
        )
    return "\n".join(rows)


def _measurements(lines: list[Line]) -> str:
    names = list(dict.fromkeys(name for line in lines for name in line.outcome.figures))
    rows = [f"| measured | {' | '.join(names)} | |", f"| --- |{' ---: |' * len(names)} --- |"]
    for line in lines:
        figures = [_figure(line.outcome.figures.get(name)) for name in names]
        outcome = line.outcome
        note = outcome.note if outcome.status == INFO else f"{outcome.status}: {outcome.note}"
        rows.append(f"| {_cell(line.name)} | {' | '.join(figures)} | {_cell(note)} |")
    return "\n".join(rows)


def _compiled(compiled: dict[str, list[float]]) -> str:
    rows = ["| kernel | compiled, times | s in all | longest, s |", "| --- | ---: | ---: | ---: |"]
    for kernel, seconds in sorted(compiled.items(), key=lambda item: -sum(item[1])):
        rows.append(
            f"| {_cell(kernel)} | {len(seconds)} | {sum(seconds):.1f} | {max(seconds):.1f} |"
        )
    return "\n".join(rows)


def terminal_line(line: Line) -> str:
    """One line: status, name, error and what is allowed, note."""
    outcome = line.outcome
    parts = [f"{outcome.status:<6}", f"{line.group}: {line.name}"]
    if outcome.error is not None:
        parts.append(f"error {_number(outcome.error)}, allowed {_number(outcome.allowed)}")
    if outcome.status == INFO or outcome.figures:
        parts += [f"{name} {_figure(value)}" for name, value in outcome.figures.items()]
    if outcome.note:
        parts.append(outcome.note)
    return "  ".join(parts)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
