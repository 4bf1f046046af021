"""The shapes of the lookups, and what they depend on: tile sizes, warps and programs."""

import functools
import math
from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

# Steps of the bisection that bounds a row's k-th best.
ROUNDS = 6
# Beyond this many reads of a head, or pairs of ranks, sorting needs more than a program has.
MAX_TOP_K = 4096
MAX_PAIRS = 8192
# The most keys of a stretch, and entries of all stretches, that are sorted in registers.
MAX_SORTED = 256
MAX_MERGED = 2048
# Triton 3.6 gives every loop that loads ahead memory of its own, and the lookups have two.
SHARES_MEMORY = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7)


def log2_ceil(n: int) -> int:
    """The least e with 2 ** e >= n."""
    return max(0, (n - 1).bit_length())


@dataclass(frozen=True)
class Chip:
    """What shapes depend on: the architecture, multiprocessors, and a program's shared bytes."""

    architecture: str
    multiprocessors: int
    shared: int


# What the interpreter takes shapes for: small, for its programs run one after another.
INTERPRETER = Chip("sm_90", 16, 227 << 10)


def chip(device: torch.device) -> Chip:
    """The chip of a device."""
    if device.type != "cuda":
        return INTERPRETER
    index = torch.cuda.current_device() if device.index is None else device.index
    return _chip(index)


@functools.cache
def _chip(index: int) -> Chip:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        architecture = properties.gcnArchName.split(":")[0]
    else:
        architecture = f"sm_{properties.major}{properties.minor}"
    # torch does not say for AMD's, of which all have 64 KiB or more.
    shared = getattr(properties, "shared_memory_per_block_optin", 64 << 10)
    return Chip(architecture, properties.multi_processor_count, shared)


def takes_float32(query: Tensor, keys: Tensor) -> bool:
    """Whether scores take float32: those of float32, or of mixed dtypes."""
    return query.dtype != keys.dtype or query.dtype == torch.float32


def scores_in_float32(query: Tensor, keys: Tensor) -> bool:
    """Whether to score in float32: what takes it, and all in the interpreter."""
    # Its products of bfloat16 are wrong.
    return triton.knobs.runtime.interpret or takes_float32(query, keys)


def float32_precision(device: torch.device) -> str:
    """How to multiply float32: as exactly as tensor cores can, three products for one."""
    return "tf32x3" if chip(device).architecture.startswith("sm_") else "ieee"


def load_stages(device: torch.device) -> int:
    """Tiles to have in shared memory at once: the more, the more loads run ahead."""
    return 3 if chip(device).shared > 64 << 10 else 1


def block_of_dim(dim: int, most: int) -> int:
    """Elements of a query to score at a time: a power of two that tensor cores take."""
    return max(16, min(1 << log2_ceil(dim), most))


@dataclass(frozen=True)
class Splits:
    """How a lookup of few queries runs (see `split_topk`).

    rows: queries of a program. tile, block_d: keys and elements of them scored at a time. top: of
    the sorted best. splits: programs that share a head's keys. warps, stages: of a program, and of
    its loads. merged, merge_warps: entries of all splits, and warps that merge them. upcast:
    whether to score in float32. precision: of float32 products.
    """

    rows: int
    tile: int
    block_d: int
    top: int
    splits: int
    warps: int
    stages: int
    merged: int
    merge_warps: int
    upcast: bool
    precision: str


def choose_splits(query: Tensor, keys: Tensor, top_k: int) -> Splits | None:
    """The shape for few queries [T, H, D] and keys [..., K, D]; None for many."""
    num_tokens, heads, dim = query.shape
    num_keys = keys.shape[-2]
    top = 1 << max(4, log2_ceil(top_k))
    on = chip(query.device)
    at_once = on.multiprocessors
    if 2 * triton.cdiv(num_tokens, 64) * heads >= at_once or top > MAX_SORTED:
        return None
    upcast = scores_in_float32(query, keys)
    tile = max(64, top)
    # The shapes that spill nothing and leave room for 16 warps on a multiprocessor.
    block_d = 16 if upcast else 64
    if top == MAX_SORTED and not upcast:
        block_d = 16 if on.architecture == "sm_80" else 128
    blocks = triton.cdiv(num_tokens, 16) * heads
    splits = min(4 * at_once // blocks, triton.cdiv(num_keys, tile), MAX_MERGED // top)
    splits = max(1, splits)
    merged = 1 << log2_ceil(splits * top)
    return Splits(
        rows=16,
        tile=tile,
        block_d=block_of_dim(dim, block_d),
        top=top,
        splits=splits,
        warps=4 if top < 64 else 8 if top == 64 else 16,
        stages=min(2 if top <= 64 else 1, load_stages(query.device)),
        merged=merged,
        merge_warps=max(1, min(8, merged // 128)),
        upcast=upcast,
        precision=float32_precision(query.device),
    )


@dataclass(frozen=True)
class Lists:
    """How a lookup of many queries runs (see `selection`).

    rows: queries of a program. tile, block_d: keys and elements of them scored at a time. warps,
    stages, registers: of a program, of its loads, and of a thread. log_list, log_top: of the
    lengths of a list and of its sorted part. sample, sets: keys looked at first for a bound, and
    sets of groups of them whose maxima are kept. first_cut, growth: keys after which the lists are
    cut back to the best first, and twice the factor from one cut to the next. speculate: whether
    bounds may be too high, if that is improbable; then lists are not cut, but looked at for a
    better one. spread: whether the keys seen first are spread over all (see `tile_stride`). fit:
    how tiles fit the keys (see `scoring.tile_from`). upcast: whether to score in float32.
    precision: of float32 products; "float16x3" is that of numbers in two parts (see
    `float32_products`). spare: entries that a row has in memory beside its list, for parts of
    queries that do not fit into shared memory.
    """

    rows: int
    tile: int
    block_d: int
    warps: int
    log_list: int
    log_top: int
    stages: int
    registers: int
    sets: int
    sample: int
    first_cut: int
    growth: int
    speculate: bool
    spread: bool
    fit: int
    upcast: bool
    precision: str
    spare: int

    @property
    def in_parts(self) -> bool:
        """Whether numbers are multiplied in two parts (see `float32_products`)."""
        return self.precision == "float16x3"

    def constants(self) -> dict[str, int | bool | str]:
        """The constants of `selection.select`."""
        return {
            "BLOCK_D": self.block_d,
            "ROWS": self.rows,
            "TILE": self.tile,
            "WARPS": self.warps,
            "STAGES": self.stages,
            "LOG_LIST": self.log_list,
            "LOG_TOP": self.log_top,
            "SETS": self.sets,
            "SAMPLE": self.sample,
            "ROUNDS": ROUNDS,
            "FIRST_CUT": self.first_cut,
            "GROWTH": self.growth,
            "SPECULATE": self.speculate,
            "SPREAD": self.spread,
            "FIT": self.fit,
            "UPCAST": self.upcast,
            "PRECISION": self.precision,
        }

    def options(self) -> dict[str, int | bool]:
        """The compiler's options."""
        options = {"num_warps": self.warps, "num_stages": 1, "enable_fp_fusion": True}
        if self.registers:
            options["maxnreg"] = self.registers
        return options


def tile_stride(num_keys: int, tile: int) -> int:
    """Keys from a tile to the one that is gone through next, around the circle of all tiles.

    About 0.618 of their number, and prime to it: all are visited, and any few in a row are spread
    almost evenly.
    """
    tiles = triton.cdiv(num_keys, tile)
    step = max(1, round(0.618034 * tiles))
    while math.gcd(step, tiles) > 1:
        step += 1
    return step * tile


def choose_lists(query: Tensor, keys: Tensor, top_k: int) -> Lists:
    """The shape for many queries [T, H, ...] and keys [..., K, D].

    Tall tiles read the keys seldom: 256 rows where they leave no multiprocessor idle, nothing
    spills and the queries fit into shared memory whole, else half of that. float32 is multiplied in
    two parts on Hopper, and on sm_80 where the queries' fit into registers.
    """
    num_tokens, heads, _ = query.shape
    num_keys, dim = keys.shape[-2:]
    if top_k > MAX_TOP_K:
        raise ValueError(f"top_k is {top_k}, but the kernels sort at most {MAX_TOP_K} keys a head")
    upcast = scores_in_float32(query, keys)
    log_top = max(4, log2_ceil(top_k))
    size = 4 if upcast else query.element_size()
    on = chip(query.device)
    tile, stages, registers = 64, 1, 255
    rows = 128
    tall = 256 if triton.cdiv(num_tokens, 256) * heads >= on.multiprocessors else 128

    def whole(rows: int, stages: int) -> bool:
        return (rows + stages * tile) * block_of_dim(dim, 1 << 16) * size <= on.shared

    precision = float32_precision(query.device)
    if not on.architecture.startswith("sm_"):
        rows, registers = 64, 0
    elif on.architecture == "sm_90" and takes_float32(query, keys):
        precision, registers = "float16x3", 128
        stages = 2 if SHARES_MEMORY else 1
    elif on.architecture == "sm_80" and takes_float32(query, keys) and log_top < 7 and dim <= 256:
        precision = "float16x3"
        stages = 2 if SHARES_MEMORY else 1
    elif on.architecture == "sm_90" and size == 2:
        # Sixteen warps on a multiprocessor, whose registers allow no more.
        registers = 128
        if log_top < 7 and (whole(256, 2) or not whole(128, 1)):
            rows = tall
        stages = 2 if rows == 256 and SHARES_MEMORY else 1
    elif on.architecture == "sm_80" and size == 2 and log_top < 6 and dim <= 256:
        # Two programs of 64 rows spill nothing, and are no slower than one of 128.
        rows = 64
    spare = 0
    if precision == "float16x3" and log_top < 7 and dim <= 256:
        tile = 32
        block_d = block_of_dim(dim, 256)
    elif precision == "float16x3":
        # The parts of the queries, and their units, are read again for each tile.
        block_d = block_of_dim(dim, 64)
        if dim > block_d:
            spare = triton.cdiv(4 * (triton.cdiv(dim, block_d) * block_d + 1), 8)
    elif size == 4:
        block_d = block_of_dim(dim, 64)
    elif whole(rows, stages):
        block_d = block_of_dim(dim, 1 << 16)
    else:
        # Read again for each tile, a part at a time.
        block_d = block_of_dim(dim, 256)
        while block_d > 16 and stages * (rows + tile) * block_d * size > on.shared:
            block_d //= 2
    # So that there are twice as many maxima as are wanted, or four times: then a sixth fewer keys
    # reach the bound, which is worth a longer bisection where what is appended limits.
    sets = 64 // tile * 2 ** max(0, log_top - 5) if log_top < 8 else 0
    busy = 2 * triton.cdiv(num_tokens, rows) * heads >= on.multiprocessors
    if (
        on.architecture == "sm_90" and size == 2 and busy and log_top < 6
        and num_keys <= 1024 and num_keys % tile == 0
    ):  # fmt: skip
        sets = 2
    # Few of a small codebook are worth a bound, but not after many of them.
    sample = 512 if num_keys <= 512 else 1024
    if log_top < 6:
        cut, growth = (1664, 5) if sample == 1024 else (1024, 5)
    else:
        cut, growth = 512, 3
    # Of a few of many keys the bounds that are sure come late, or cost too many scores. Triton 3.6
    # would look at lists through shared memory, of which there is too little left.
    speculate = log_top < 6 and num_keys > 1024 and SHARES_MEMORY
    if speculate:
        sample, cut, growth = 512, 640, 4
        if rows == 256 and stages == 2 and block_d == dim:
            # As much shared memory, and half the instructions for a tensor core's operands.
            tile, stages = 128, 1
    return Lists(
        rows=rows,
        tile=tile,
        block_d=block_d,
        # Of sixteen rows each; two share them where there are but 128.
        warps=16 if registers == 128 else rows // 16,
        log_list=max(8, 1 + log2_ceil(2**log_top + tile)),
        log_top=log_top,
        stages=stages,
        registers=registers,
        sets=sets,
        sample=sample,
        first_cut=cut,
        growth=growth,
        speculate=speculate,
        # Else those looked at first are most of the keys.
        spread=2 * sample <= num_keys <= 1 << 30,
        fit=2 if num_keys % tile == 0 else int(num_keys >= tile),
        upcast=upcast,
        precision=precision,
        spare=spare,
    )


@dataclass(frozen=True)
class Sums:
    """How the best sums of two halves are found (see `pairs`).

    log_pairs, log_list, log_top: of the numbers of pairs of ranks, of sums a list has room for,
    and of its sorted part. slots: of all that a row has in memory. keep: whether the first half's
    best stay there, or wait where the result will be. apart: the shape of a launch of its own; None
    where it is the lookup's.
    """

    log_pairs: int
    log_list: int
    log_top: int
    slots: int
    keep: bool
    apart: Lists | None


def choose_sums(many: Lists, top_k: int, num_pairs: int) -> Sums:
    """How to combine the halves of a lookup of this shape, for which num_pairs can matter."""
    log_top = max(4, log2_ceil(top_k))
    log_pairs = max(6, log_top, log2_ceil(num_pairs))
    # Room for eight times as many as are wanted, or twice, not to take too much memory: lists are
    # cut back when they are full, but each time takes another sorting.
    log_list = min(log_pairs, log_top + 3 if log_top <= 8 else log_top + 1)
    best = 2**many.log_top
    if many.log_top < 7 and not many.in_parts:
        # Kept, they take no traffic, but memory that counts beside small codebooks.
        keep = many.speculate
        slots = max(best * keep + 2**many.log_list, 2 * best + 2**log_list) + 1
        return Sums(log_pairs, log_list, log_top, slots, keep, None)
    # What the two have to keep beside each other would spill. Small programs, for one list that is
    # too long, or not exact, makes all dearer that are sorted with it; but long lists need threads.
    if log_top <= 8:
        apart = replace(many, rows=32, warps=4)
    else:
        apart = replace(many, rows=128, warps=16, registers=min(many.registers, 128))
    return Sums(log_pairs, log_list, log_top, 2 * best + 2**log_list + 1, False, apart)


def list_programs(query: Tensor, shape: Lists) -> int:
    """Programs for the blocks of query [T, H, ...]: as many as run at once, all equally busy.

    Each has its lists in memory, so more would take more of it.
    """
    blocks = triton.cdiv(query.shape[0], shape.rows) * query.shape[1]
    # By the registers of a multiprocessor; where they are not stated, a guess.
    registers = 8 * triton.cdiv(shape.registers or 128, 8)
    at_once = chip(query.device).multiprocessors * (65536 // (registers * 32 * shape.warps))
    return triton.cdiv(blocks, triton.cdiv(blocks, at_once))
