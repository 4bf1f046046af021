"""The lookups' shapes: tile sizes, warps and programs, by sizes and dtypes."""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

# Steps of the bisection that bounds a row's k-th best.
ROUNDS = 6
# A lookup splits the keys of a head over at most this many programs.
MAX_SPLITS = 16
# Beyond this many reads of a head, or pairs of ranks, sorting needs more than a program has.
MAX_TOP_K = 4096
MAX_PAIRS = 8192


def log2_ceil(n: int) -> int:
    """The least e with 2 ** e >= n."""
    return max(0, (n - 1).bit_length())


def programs_at_once(device: torch.device) -> int:
    """Programs to start for a device, of which each has one or two on every multiprocessor."""
    if device.type != "cuda":
        return 4  # The interpreter runs one after another.
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count


def on_amd() -> bool:
    """Whether the kernels are for AMD's GPUs."""
    return torch.version.hip is not None


@dataclass(frozen=True)
class Lookup:
    """How a lookup runs. All but `splits` are compile-time constants.

    rows: queries of a program. tile, block_d: keys and elements of them scored at a time.
    warps: of a program. log_list, log_short, log_top: of the lengths of a list, of one that sorts
    quickly, and of its sorted part. full: length from which a list is cut back. log_merge: of the
    length of a list of all splits. sample: keys looked at first for a bound. splits: programs
    that share a head's keys. even: whether tiles fill the keys. upcast: whether to score in
    float32. precision: of float32 products.
    """

    rows: int
    tile: int
    block_d: int
    warps: int
    log_list: int
    log_short: int
    full: int
    log_top: int
    log_merge: int
    sample: int
    splits: int
    even: bool
    upcast: bool
    precision: str

    def select_constants(self) -> dict[str, int | bool | str]:
        """The constants of `selection.select`."""
        return {
            "BLOCK_D": self.block_d,
            "ROWS": self.rows,
            "TILE": self.tile,
            "WARPS": self.warps,
            "LOG_LIST": self.log_list,
            "LOG_SHORT": self.log_short,
            "LOG_TOP": self.log_top,
            "FULL": self.full,
            "SAMPLE": self.sample,
            "ROUNDS": ROUNDS,
            "EVEN": self.even,
            "UPCAST": self.upcast,
            "PRECISION": self.precision,
        }

    def options(self) -> dict[str, int | bool]:
        """The compiler's options."""
        options = {"num_warps": self.warps, "num_stages": 1, "enable_fp_fusion": True}
        if not on_amd():
            # Two programs of 8 warps, or one of 16, on a multiprocessor.
            options["maxnreg"] = 128
        return options


def choose_lookup(query: Tensor, keys: Tensor, top_k: int) -> Lookup:
    """The shape for query [T, H, D] and keys [..., K, D].

    Many queries fill the chip with tall tiles, that read the keys seldom; few, by splitting keys.
    """
    num_tokens, heads, dim = query.shape
    num_keys = keys.shape[-2]
    if top_k > MAX_TOP_K:
        raise ValueError(f"top_k is {top_k}, but the kernels sort at most {MAX_TOP_K} keys a head")
    # The interpreter's products of bfloat16 are wrong.
    mixed = query.dtype != keys.dtype or query.dtype == torch.float32
    upcast = mixed or triton.knobs.runtime.interpret
    log_top = max(4, log2_ceil(top_k))
    tile = 128 if log_top == 6 else 64
    tall = num_tokens * heads >= 64 * programs_at_once(query.device) and log_top <= 6
    if tall:
        # 256 rows of a query take 128 KiB of shared memory, of which AMD's have 64.
        rows = 256 if log_top < 6 and not upcast and not on_amd() else 64
        warps = rows // 16
        splits = 1
    else:
        rows, warps = 16, 4
        blocks = triton.cdiv(num_tokens, rows) * heads
        splits = min(programs_at_once(query.device) // blocks, MAX_SPLITS)
        splits = max(1, min(splits, num_keys // max(top_k, tile)))
    block_d = max(16, min(1 << log2_ceil(dim), 256))
    if upcast:
        block_d = 32
    elif dim > 256:
        block_d = 128
    sample = 512
    log_list = max(8, 1 + log2_ceil(2**log_top + tile))
    log_short = max(6, log_top + 1) + (num_keys > sample)
    return Lookup(
        rows=rows,
        tile=tile,
        block_d=block_d,
        warps=warps,
        log_list=log_list,
        log_short=log_short,
        full=3 * 2**log_short // 4 if num_keys > sample else 2**log_list - tile,
        log_top=log_top,
        log_merge=log_top + 4,
        sample=sample,
        splits=splits,
        even=splits == 1 and num_keys % tile == 0,
        upcast=upcast,
        precision="ieee",
    )
