"""Which points a sweep measures: presets, and the axes a user replaces."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pkm_triton.perf.records.points import IMPLEMENTATIONS, Point
from pkm_triton.perf.report.paper import TABLE_4_NUM_SUBKEYS as PAPER_SIZES

Axes = Mapping[str, Sequence[Any]]
"""Values for fields of `Point`; a grid is the product of its axes."""


_TEXTBOOK = ("pkm_triton", "textbook")
_ONE_NORM = {"query_norm": ["layer"]}  # the one that all implementations know


def _sizes(product: Sequence[int], flat: Sequence[int], **widths: Any) -> list[Axes]:
    """Speed and memory against memory size, for both kinds of keys."""
    fixed = {name: [value] for name, value in widths.items()}
    return [
        {**fixed, "num_subkeys": product, "implementation": _TEXTBOOK},
        {**fixed, "num_subkeys": flat, "keys": ["flat"]},
        {
            **fixed,
            "num_subkeys": product,
            "implementation": _TEXTBOOK,
            "pass_name": ["forward+backward"],
            "sparse_grad": [True],
        },
    ]


@dataclass(frozen=True)
class Preset:
    """Grids to measure, and the time to spend on each pass."""

    seconds: float
    grids: list[Axes]


PRESETS = {
    "quick": Preset(
        0.1,
        [
            *_sizes((128, 256, 512), (128, 256), dim=256, tokens=256),
            {"num_subkeys": [256], "top_k": [8, 16, 32, 64], "implementation": IMPLEMENTATIONS}
            | {"dim": [256], "tokens": [256]}
            | _ONE_NORM,
            {"num_subkeys": [256], "heads": [1, 2, 4, 8], "implementation": IMPLEMENTATIONS}
            | {"dim": [256], "tokens": [256]}
            | _ONE_NORM,
        ],
    ),
    "default": Preset(
        0.3,
        [
            *_sizes(PAPER_SIZES, PAPER_SIZES),
            {"top_k": [8, 16, 32, 64, 128], "implementation": IMPLEMENTATIONS} | _ONE_NORM,
            {"heads": [1, 2, 4, 8], "implementation": IMPLEMENTATIONS} | _ONE_NORM,
        ],
    ),
    "paper": Preset(
        0.5,
        [
            *_sizes(PAPER_SIZES, PAPER_SIZES, dim=1024, query_dim=512),
            {"top_k": [8, 16, 32, 64, 128], "dim": [1024], "query_dim": [512]},
            {"heads": [1, 2, 4, 8], "dim": [1024], "query_dim": [512]},
        ],
    ),
    "baselines": Preset(
        2.0,
        [
            {
                "tokens": [512, 1],
                "top_k": [32, 64],
                "implementation": IMPLEMENTATIONS,
                "threads": ["one", "all"],
                **_ONE_NORM,
            },
            {
                "tokens": [512, 1],
                "top_k": [32, 64],
                "implementation": IMPLEMENTATIONS,
                "threads": ["one", "all"],
                "pass_name": ["forward+backward"],
                "sparse_grad": [False, True],
                **_ONE_NORM,
            },
        ],
    ),
    "step": Preset(
        3.0,
        [
            {
                "tokens": [1024],
                "implementation": _TEXTBOOK,
                "pass_name": ["step"],
                "sparse_grad": [False, True],
                "reads": ["uniform", "zipf"],
                "threads": ["one", "all"],
            },
            {
                "tokens": [1024],
                "pass_name": ["fused-step"],
                "reads": ["uniform", "zipf"],
                "threads": ["one", "all"],
            },
            {
                "num_subkeys": [256],
                "tokens": [16, 64, 256, 1024, 4096],
                "pass_name": ["step"],
                "sparse_grad": [False, True],
                "reads": ["uniform", "zipf"],
            },
            {
                "num_subkeys": [256],
                "tokens": [16, 64, 256, 1024, 4096],
                "pass_name": ["fused-step"],
                "reads": ["uniform", "zipf"],
            },
        ],
    ),
}


def make_points(
    preset: str | None,
    replaced: Axes,
    *,
    device: str,
    all_threads: int,
) -> list[Point]:
    """The points of a preset, each once, with some axes replaced in all of its grids.

    Args:
        preset: a name in `PRESETS`; None for the product of `replaced` and nothing else.
        replaced: axes given by the user; they take the place of the preset's. Values are as
            wide as tokens unless `value_dim` is among them.
        device: `cpu` or `cuda`.
        all_threads: what `all` threads means.

    Raises:
        ValueError: the preset is unknown, an axis is empty, or a point is impossible.
    """
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"preset: {preset!r} is unknown; allowed: {', '.join(PRESETS)}")
    for name, values in replaced.items():
        if not values:
            raise ValueError(f"{name}: no value given; at least one is needed")
    defaults: Axes = {"device": [device], "threads": ["all"]}
    named = {"one": 1, "all": all_threads}
    points: dict[Point, None] = {}
    for grid in [{}] if preset is None else PRESETS[preset].grids:
        axes = {**defaults, **grid, **replaced}
        for values in itertools.product(*axes.values()):
            fields = dict(zip(axes, values, strict=True))
            fields["threads"] = named.get(fields["threads"], fields["threads"])
            fields.setdefault("value_dim", fields.get("dim", Point.dim))
            point = Point(**fields)
            if not point.backward:  # no gradient: one point, not two
                point = dataclasses.replace(point, sparse_grad=False)
            if point.pass_name == "fused-step":
                point = dataclasses.replace(point, sparse_grad=True)
            points[point] = None
    return list(points)
