"""The decoder of a top-k sparse autoencoder by `gather_values`, beside two other ways.

A top-k autoencoder writes an activation as a weighted sum of k rows of a decoder [K, d]: a gather.
Prints, side by side, the time of a forward and backward pass (medians of rounds that take turns),
what is saved for the backward pass beside the decoder, and how far outputs and gradients are from
those of the dense product; then trains one.

    python examples/sparse_autoencoder.py --latents 16384 --width 512 --top-k 64
"""

import argparse
import statistics
import time

import torch
import torch.nn.functional as F
from torch import Tensor

import pkm_triton as pkm


def dense_product(decoder: Tensor, slots: Tensor, codes: Tensor) -> Tensor:
    """All K codes of each token, nearly all of them zero, times the decoder."""
    return codes.new_zeros(len(codes), len(decoder)).scatter(1, slots, codes) @ decoder


WAYS = {
    "dense product": dense_product,
    "embedding_bag": lambda d, s, c: F.embedding_bag(s, d, per_sample_weights=c, mode="sum"),
    "gather_values": pkm.gather_values,
    "gather_values, sparse_grad": lambda *inputs: pkm.gather_values(*inputs, sparse_grad=True),
}

parser = argparse.ArgumentParser()
for name, default in (("latents", 16384), ("width", 512), ("top-k", 64), ("tokens", 1024)):
    parser.add_argument(f"--{name}", type=int, default=default)
parser.add_argument("--rounds", type=int, default=5)
parser.add_argument("--steps", type=int, default=50)
options = parser.parse_args()

encoder = torch.randn(options.width, options.latents) / options.width**0.5
decoder = encoder.T.contiguous().requires_grad_()
x = torch.randn(options.tokens, options.width)
codes, slots = (x @ encoder).relu().topk(options.top_k)
codes.requires_grad_()

seconds: dict[str, list[float]] = {name: [] for name in WAYS}
saved, results = {}, {}
for _ in range(options.rounds + 1):
    for name, decode in WAYS.items():
        kept: list[Tensor] = []
        start = time.perf_counter()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, kept=kept: kept.append(tensor) or tensor, lambda tensor: tensor
        ):
            out = decode(decoder, slots, codes)
        grads = torch.autograd.grad(out, (decoder, codes), x)
        seconds[name].append(time.perf_counter() - start)
        storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in kept)}
        storages.pop(decoder.untyped_storage().data_ptr(), None)
        saved[name], results[name] = sum(storages.values()), [out, grads[0].to_dense(), grads[1]]
print(f"{'decoder by':28}{'ms':>8}{'saved MB':>10}{'furthest':>10}")
for name in WAYS:
    pairs = zip(results[name], results["dense product"], strict=True)
    error = max((one - other).abs().max().item() for one, other in pairs)
    milliseconds = 1000 * statistics.median(seconds[name][1:])
    print(f"{name:28}{milliseconds:8.1f}{saved[name] / 1e6:10.2f}{error:10.1e}")

encoder.requires_grad_()
optimiser = torch.optim.Adam([encoder, decoder], lr=1e-3)
losses = []
for _ in range(options.steps):
    codes, slots = (x @ encoder).relu().topk(options.top_k)
    loss = (pkm.gather_values(decoder, slots, codes) - x).square().mean()
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    losses.append(loss.item())
print(f"loss {losses[0]:.4f} to {losses[-1]:.4f} in {options.steps} steps")
