"""What each of two ranks runs under DistributedDataParallel; imported by their processes."""

import torch
from torch import distributed, nn

import pkm_triton as pkm
from pkm_triton.optim import SparseAdam, clip_grad_norm_

SIZES = {"num_subkeys": 6, "heads": 2, "top_k": 3, "query_dim": 4, "query_norm": "layer"}


def make_model(sparse_grad):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 8), pkm.ProductKeyMemory(8, **SIZES, sparse_grad=sparse_grad))


def average_sparse(model):
    """What a user adds for sparse gradients, which DistributedDataParallel does not average."""
    for parameter in model.parameters():
        if parameter.grad is not None and parameter.grad.is_sparse:
            grad = parameter.grad.coalesce()
            distributed.all_reduce(grad)
            parameter.grad = grad / 2


def train(model, parts, after_backward=lambda model: None):
    """Three steps of two backward passes, clipped; `parts`: which halves of a batch it sees."""
    optimiser = SparseAdam(model.parameters(), lr=0.05, eps=1e-3)
    for step in range(3):
        optimiser.zero_grad()
        for half in range(2):
            seed = torch.Generator().manual_seed(2 * step + half)
            x = torch.randn(2, 5, 8, generator=seed)
            (sum(model(x[part]).square().sum() for part in parts) / len(parts)).backward()
        after_backward(model)
        clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    return {
        name.removeprefix("module."): parameter.detach()
        for name, parameter in model.named_parameters()
    }


def run_rank(rank, folder):
    """Train with dense and with sparse gradients; see that factors are refused."""
    parallel = nn.parallel.DistributedDataParallel
    torch.save(train(parallel(make_model(False)), [rank]), f"{folder}/False-{rank}.pt")
    sparse = make_model(True)
    parallel._set_params_and_buffers_to_ignore_for_model(sparse, ["1.values"])
    trained = train(parallel(sparse), [rank], average_sparse)
    torch.save(trained, f"{folder}/True-{rank}.pt")
    factored, refused = parallel(make_model("factored")), "nothing was raised"
    try:
        factored(torch.randn(5, 8)).sum().backward()
    except Exception as error:
        refused = f"{type(error).__name__}: {error}"
    torch.save(refused, f"{folder}/factored-{rank}.pt")
