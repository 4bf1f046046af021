"""Markdown tables of a sweep: the form of the paper's Table 4, and the comparison."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from pkm_triton.perf.measure import roofline
from pkm_triton.perf.records.points import IMPLEMENTATIONS, PASSES
from pkm_triton.perf.records.sweep_row import POINT_FIELDS, Row

from . import paper
from .plot_bandwidth import share_of_copy
from .plot_style import count_label, number, slots_label
from .slices import compared, describe, gradient, machine, reliability, sets_along, told_apart

MISSING = "–"


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table, the first column to the left and the others to the right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *lines))


def size_table(rows: Sequence[Row]) -> str | None:
    """Speed, slow-down and memory against the number of slots; None without data.

    A section for each set of rows that covers two sizes or more, or for the best where none does.
    """
    own = [row for row in rows if row.implementation == "pkm_triton"]
    sections: list[str] = []
    for pass_name in PASSES:
        sets = sets_along(own, "num_subkeys", pass_name=pass_name)
        if not sets:
            sets = sets_along(own, "num_subkeys", pass_name=pass_name, least=1)[:1]
        sections += [section for found in sets if (section := _size_section(found)) is not None]
    return "\n\n".join(sections) if sections else None


def _size_section(own: Sequence[Row]) -> str | None:
    pass_name = own[0].pass_name
    sizes = sorted({row.num_subkeys for row in own})
    if not sizes:
        return None
    lines = [["\\|C\\|", *map(str, sizes)]]
    for keys in ("flat", "product"):
        by_size = {row.num_subkeys: row for row in own if row.keys == keys and row.ok}
        if by_size:
            lines += _lines_of(by_size, sizes, f"{keys} keys")
    if pass_name == "forward":
        lines += _published(sizes)
    notes = [
        f"{row.keys} keys, {slots_label(row.num_slots)}: {row.status}." for row in own if not row.ok
    ]
    table = markdown(["memory size", *[slots_label(size**2) for size in sizes]], lines)
    caption = (
        f"One layer, {pass_name}{gradient(own[0])}: {describe(own[0], 'num_subkeys')}. "
        f"{machine(own[0])}."
    )
    parts = [f"### {pass_name.capitalize()}", caption, table, *notes, reliability(own)]
    return "\n\n".join(part for part in parts if part)


def _lines_of(by_size: Mapping[int, Row], sizes: Sequence[int], keys: str) -> list[list[str]]:
    """The lines of one kind of keys; sizes without a measurement are marked."""
    smallest = by_size[min(by_size)].median_ms
    figures: dict[str, Callable[[Row], str]] = {
        "speed (tokens/s)": lambda row: count_label(row.tokens_per_s),
        "time (ms)": lambda row: number(row.median_ms),
        "CPU time, all threads (ms)": lambda row: number(row.cpu_ms),
        "the kernels alone (ms)": lambda row: number(row.graph_ms),
        "first call (s)": lambda row: number(row.first_call_s),
        "of that compiling kernels (s)": lambda row: number(row.compile_s),
        "share of the measured copy": _copy_share,
        "slow-down": lambda row: f"{row.median_ms / smallest:.2f}×",
        "query, lookup, gather (ms)": _parts,
        "peak extra memory (MiB)": lambda row: f"{row.peak_bytes / 2**20:.1f}",
        "parameters (MiB)": lambda row: f"{row.parameter_bytes / 2**20:.0f}",
    }
    if not any(math.isnan(row.roofline) for row in by_size.values()):
        figures["share of the memory bandwidth"] = lambda row: f"{row.roofline:.0%}"
        figures["the lookup's share of it"] = _lookup_share
    lines = [
        [f"{name}, {keys}"]
        + [text(by_size[size]) if size in by_size else MISSING for size in sizes]
        for name, text in figures.items()
    ]
    # What older files and other devices do not have is left out.
    return [line for line in lines if set(line[1:]) != {MISSING}]


def _published(sizes: Sequence[int]) -> list[list[str]]:
    """The paper's own speeds."""
    lines: list[list[str]] = []
    for keys, speeds in paper.TABLE_4_WORDS_PER_S.items():
        words = dict(zip(paper.TABLE_4_NUM_SUBKEYS, speeds, strict=True))
        cells = [count_label(words[size]) if size in words else MISSING for size in sizes]
        lines.append([f"paper, words/s of a whole model on GPUs, {keys} keys", *cells])
    return lines


def _copy_share(row: Row) -> str:
    share = share_of_copy(row)
    return MISSING if math.isnan(share) else f"{share:.0%}"


def _lookup_share(row: Row) -> str:
    # The whole pass's share says what the bandwidth is.
    bandwidth = row.moved_bytes / row.roofline / (row.median_ms / 1e3)
    return f"{roofline.lookup_share(row, row.lookup_ms, bandwidth):.0%}"


def _parts(row: Row) -> str:
    return ", ".join(number(each) for each in (row.query_ms, row.lookup_ms, row.gather_ms))


def all_rows_table(rows: Sequence[Row]) -> str | None:
    """Every row of the sweep, with the parameters in which the rows differ; None without any."""
    if not rows:
        return None
    names = ["device_name", *POINT_FIELDS, "seed", "seconds"]
    varied = [name for name in names if len({getattr(row, name) for row in rows}) > 1]
    header = [*(name.replace("_", " ") for name in varied), "ms", "20 % to 80 %", "CPU ms"]
    header += ["samples", "tokens/s", "working MiB", ""]
    lines = [
        [
            *(str(getattr(row, name)) for name in varied),
            *(_figures(row) if row.ok else [MISSING] * 6),
            _cell(row.remark if row.ok else row.status),
        ]
        for row in rows
    ]
    shared = ", ".join(f"{name} {getattr(rows[0], name)}" for name in names if name not in varied)
    return f"{shared}.\n\n{markdown(header, lines)}"


def _figures(row: Row) -> list[str]:
    return [
        number(row.median_ms),
        f"{number(row.low_ms)} to {number(row.high_ms)}",
        number(row.cpu_ms),
        str(row.samples),
        count_label(row.tokens_per_s),
        number(row.working_bytes / 2**20),
    ]


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


_COLUMNS = (
    "num_subkeys", "heads", "top_k", "tokens", "pass_name", "reads", "sparse_grad", "threads",
)  # fmt: skip
"""What every line of the comparison says of its point."""


def comparison_table(rows: Sequence[Row]) -> str | None:
    """Implementations side by side, with ratios of medians and of memory; None without any."""
    sets = compared(rows)
    if not sets:
        return None
    names = [name for name in IMPLEMENTATIONS if any(name in found for found in sets)]
    others = [name for name in names if name != "pkm_triton"]
    firsts = [next(iter(found.values())) for found in sets]
    apart = told_apart(firsts, *_COLUMNS)
    header = ["\\|C\\|", "heads", "k", "tokens", "pass", "gradient", "threads"]
    header += [name.replace("_", " ") for name in apart]
    header += [f"{name} (ms)" for name in names]
    header += [f"{name} / pkm_triton" for name in others]
    header += [f"{name}, working MiB" for name in names]
    lines = [_comparison_line(found, names, others, apart) for found in sets]
    first = firsts[0]
    device = "" if "device_name" in apart else f"{first.device_name}; "
    caption = (
        "Medians, of interleaved rounds where one run held the implementations in memory together; "
        "a ratio above 1 means that pkm_triton is faster. Working memory is the most that a pass "
        "allocates, the gradients it leaves aside. "
        f"{describe(first, *_COLUMNS, *apart)}. {device}torch {first.torch_version}, "
        f"pkm_triton {first.pkm_triton_version}. "
        f"{reliability(row for found in sets for row in found.values())}".rstrip()
    )
    return f"{caption}\n\n{markdown(header, lines)}"


def _comparison_line(
    found: dict[str, Row], names: Sequence[str], others: Sequence[str], apart: Sequence[str]
) -> list[str]:
    row = next(iter(found.values()))
    own = found.get("pkm_triton")
    gradient = ("sparse" if row.sparse_grad else "dense") if row.backward else MISSING
    cells = [str(value) for value in (row.num_subkeys, row.heads, row.top_k, row.tokens)]
    reads = "" if row.reads == "layer" else f", {row.reads} reads"
    cells += [row.pass_name + reads, gradient, str(row.threads)]
    cells += [str(getattr(row, name)) for name in apart]
    cells += [number(found[name].median_ms) if name in found else MISSING for name in names]
    cells += [
        f"{found[name].median_ms / own.median_ms:.2f}" if own and name in found else MISSING
        for name in others
    ]
    cells += [
        f"{found[name].working_bytes / 2**20:.2f}" if name in found else MISSING for name in names
    ]
    return cells
