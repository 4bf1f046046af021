"""Rounding float32 to half precision at random, unbiased."""

import hashlib

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)


def generator_of(device: torch.device, seed: int, step: int) -> torch.Generator:
    """The random numbers of one step: those of no other seed or step."""
    # Of a seed the CPU's generator takes 32 bits, so all of both go into them.
    mixed = hashlib.blake2b(f"{seed} {step}".encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(mixed, "big"))


def round_stochastically(x: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Round float32 to bfloat16 or float16, up or down with the chances that keep the mean.

    What is rounded to beyond the largest number becomes infinite, as in torch's own conversion;
    infinity and NaN stay as they are. To be the same as in `kernels`.
    """
    bits = x.contiguous().view(torch.int32)
    random = torch.empty_like(bits)
    # Added below the last bit that is kept, a random number carries as often as it should.
    if dtype == torch.bfloat16:
        random.random_(0, 1 << 16, generator=generator)
        rounded = (bits + random).bitwise_and_(-1 << 16).view(torch.float32)
    else:
        random.random_(0, 1 << 24, generator=generator)
        # Below 2 ** -14 the spacing of float16 stays 2 ** -24: of the 24 bits more are dropped.
        exponent = (bits >> 23).bitwise_and_(0xFF)
        dropped = (126 - exponent).clamp_(13, 23)
        mask = torch.ones_like(bits).bitwise_left_shift_(dropped).sub_(1)
        rounded = (bits + (random & mask)).bitwise_and_(~mask).view(torch.float32)
        # Less than one spacing: up to it with the probability |x| / 2 ** -24, else to zero.
        up = (random.float() * 2.0**-24 < x.abs() * 2.0**24).float() * 2.0**-24
        rounded = torch.where(x.abs() < 2.0**-24, up.copysign(x), rounded)
    return torch.where(x.isfinite(), rounded, x).to(dtype)
