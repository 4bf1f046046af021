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
_COMPILED = (*_TEXTBOOK, "textbook-compiled")
_ON_CPU = (*_TEXTBOOK, "product-key-memory")
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
    """Grids to measure, and the time to spend on each pass.

    Attributes:
        seconds: time to spend on each pass.
        grids: on a CPU, and on a GPU where it has none of its own.
        gpu: on a GPU, where 512 tokens of float32 would measure launches instead of memories.
    """

    seconds: float
    grids: list[Axes]
    gpu: list[Axes] | None = None

    def on(self, device: str) -> list[Axes]:
        """The grids for `cpu` or `cuda`."""
        return self.gpu if device == "cuda" and self.gpu is not None else self.grids


_GPU = {"dtype": ["bfloat16"], "dim": [1024], "query_dim": [512]}
_GPU_BATCH = {"dtype": "bfloat16", "tokens": 16_384}
_GPU_SIZES = (128, 256, 512, 1024, 2048, 4096)


def _gpu_grids(
    product: Sequence[int],
    tuned: Sequence[int],
    flat: Sequence[int],
    tokens: int,
    decoders: Sequence[str],
) -> list[Axes]:
    """Size, top-k and heads as on a CPU, training with sparse gradients, and decoding.

    What torch.compile makes anew for each point takes most of the time: it stands along the sizes
    (`tuned`, which takes longest, at some of them) and where tokens are few.
    """
    training = {"pass_name": ["forward+backward", "step"], "sparse_grad": [True]}
    many = {**_GPU, "tokens": [tokens]}
    medium = {**many, "num_subkeys": [1024], "implementation": _TEXTBOOK}
    return [
        {**many, "num_subkeys": product, "implementation": _COMPILED},
        {**many, "num_subkeys": tuned, "implementation": ["textbook-tuned"]},
        {**many, "num_subkeys": flat, "keys": ["flat"]},
        {**many, "num_subkeys": product, "implementation": _TEXTBOOK} | training,
        {**_GPU, "num_subkeys": [1024], "tokens": [1, 64], "implementation": decoders} | _ONE_NORM,
        {**medium, "top_k": [8, 16, 32, 64, 128]},
        {**medium, "heads": [1, 2, 4, 8]},
    ]


PRESETS = {
    "quick": Preset(
        0.1,
        [
            *_sizes((128, 256, 512), (128, 256), dim=256, tokens=256),
            {"num_subkeys": [256], "top_k": [8, 16, 32, 64], "implementation": _ON_CPU}
            | {"dim": [256], "tokens": [256]}
            | _ONE_NORM,
            {"num_subkeys": [256], "heads": [1, 2, 4, 8], "implementation": _ON_CPU}
            | {"dim": [256], "tokens": [256]}
            | _ONE_NORM,
        ],
        gpu=_gpu_grids((256, 1024), (), (256,), 4096, _COMPILED),
    ),
    "default": Preset(
        0.3,
        [
            *_sizes(PAPER_SIZES, PAPER_SIZES),
            {"top_k": [8, 16, 32, 64, 128], "implementation": _ON_CPU} | _ONE_NORM,
            {"heads": [1, 2, 4, 8], "implementation": _ON_CPU} | _ONE_NORM,
        ],
        gpu=_gpu_grids(
            _GPU_SIZES, (128, 1024, 4096), (128, 256, 512, 1024), 16_384, IMPLEMENTATIONS
        ),
    ),
    "paper": Preset(
        0.5,
        [
            *_sizes(PAPER_SIZES, PAPER_SIZES, dim=1024, query_dim=512),
            {"top_k": [8, 16, 32, 64, 128], "dim": [1024], "query_dim": [512]},
            {"heads": [1, 2, 4, 8], "dim": [1024], "query_dim": [512]},
        ],
        gpu=[
            *_sizes(PAPER_SIZES, PAPER_SIZES, dim=1024, query_dim=512, **_GPU_BATCH),
            {**_GPU, "tokens": [16_384], "top_k": [8, 16, 32, 64, 128]},
            {**_GPU, "tokens": [16_384], "heads": [1, 2, 4, 8]},
        ],
    ),
    "baselines": Preset(
        2.0,
        [
            {
                "tokens": [512, 1],
                "top_k": [32, 64],
                "implementation": _ON_CPU,
                "threads": ["one", "all"],
                **_ONE_NORM,
            },
            {
                "tokens": [512, 1],
                "top_k": [32, 64],
                "implementation": _ON_CPU,
                "threads": ["one", "all"],
                "pass_name": ["forward+backward"],
                "sparse_grad": [False, True],
                **_ONE_NORM,
            },
        ],
        gpu=[
            {**_GPU, "tokens": [16_384, 64, 1], "top_k": [32, 64], **_ONE_NORM}
            | {"implementation": IMPLEMENTATIONS},
            {**_GPU, "tokens": [16_384], "top_k": [32, 64], **_ONE_NORM}
            | {"implementation": IMPLEMENTATIONS}
            | {"pass_name": ["forward+backward"], "sparse_grad": [False, True]},
        ],
    ),
    "ranks": Preset(
        0.5,
        [
            {
                "num_subkeys": [128, 256, 512],
                "pass_name": ["forward", "forward+backward"],
                "sparse_grad": [True],
                "ranks": [1, 2, 4],
                "layout": ["columns", "rows"],
                **_ONE_NORM,
            }
        ],
        gpu=[
            {**_GPU, "tokens": [16_384], "num_subkeys": [1024, 2048, 4096], **_ONE_NORM}
            | {"pass_name": ["forward", "forward+backward"], "sparse_grad": [True]}
            | {"ranks": [1, 2, 4], "layout": ["columns", "rows"]},
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
        gpu=[
            {**_GPU, "tokens": [256, 1024, 4096, 16_384], "pass_name": ["step"]}
            | {"sparse_grad": [False, True], "reads": ["uniform", "zipf"]}
            | {"implementation": _TEXTBOOK},
            {**_GPU, "tokens": [256, 1024, 4096, 16_384], "pass_name": ["fused-step"]}
            | {"reads": ["uniform", "zipf"]},
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
    for grid in [{}] if preset is None else PRESETS[preset].on(device):
        axes = {**defaults, **grid, **replaced}
        for values in itertools.product(*axes.values()):
            fields = dict(zip(axes, values, strict=True))
            fields["threads"] = named.get(fields["threads"], fields["threads"])
            fields.setdefault("value_dim", fields.get("dim", Point.dim))
            if fields.get("ranks", 1) == 1:  # one point, not one a layout
                fields["layout"] = "none"
            elif fields.get("layout", "none") == "none":
                fields["layout"] = "columns"
            point = Point(**fields)
            if not point.backward:  # no gradient: one point, not two
                point = dataclasses.replace(point, sparse_grad=False)
            if point.pass_name == "fused-step":
                point = dataclasses.replace(point, sparse_grad=True)
            points[point] = None
    return list(points)
