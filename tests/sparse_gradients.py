"""Sparse gradients for the optimisers' tests."""

import torch


def sparse(rows, values, shape):
    return torch.sparse_coo_tensor(torch.tensor(rows)[None], values, shape, check_invariants=True)


def steps(count=6, shape=(20, 7), seed=0, dtype=torch.float32):
    """Gradients, uncoalesced, of a few rows each."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        rows = torch.randint(0, shape[0], (9,), generator=generator)
        values = torch.randn(9, *shape[1:], generator=generator).to(dtype)
        yield sparse(rows.tolist(), values, shape)
