"""What each of two ranks runs under DistributedDataParallel; imported by their processes."""

import functools

import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard

import pkm_triton as pkm
from pkm_triton.gradients import FactoredGradient
from pkm_triton.optim import SparseAdam, clip_grad_norm_

SIZES = {"num_subkeys": 6, "heads": 2, "top_k": 3, "query_dim": 4, "query_norm": "layer"}
FORMS = [False, True, "factored"]


def make_model(sparse_grad, shared=False):
    torch.manual_seed(1)
    memories = [pkm.ProductKeyMemory(8, **SIZES, sparse_grad=sparse_grad) for _ in range(2)]
    if shared:
        pkm.share_values(memories)
    return nn.Sequential(nn.Linear(8, 8), memories[0], nn.Tanh(), memories[1])


def train(model, parts, after_backward=lambda model: None, dtype=torch.float32):
    """Three steps of two backward passes, clipped; `parts`: which halves of a batch it sees."""
    optimiser = SparseAdam(model.parameters(), lr=0.05, eps=1e-3)
    for step in range(3):
        optimiser.zero_grad()
        for half in range(2):
            seed = torch.Generator().manual_seed(2 * step + half)
            x = torch.randn(2, 5, 8, generator=seed).to(dtype)
            # The last is averaged with what no_sync() has left before.
            last = half == 1 or not hasattr(model, "no_sync")
            with torch.enable_grad() if last else model.no_sync():
                (sum(model(x[part]).square().sum() for part in parts) / len(parts)).backward()
        after_backward(model)
        clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    return {
        name.removeprefix("module."): parameter.detach()
        for name, parameter in model.named_parameters()
    }


def disturbed(model, rank):
    """Ranks that do not start from the same values."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += rank
    return model


def run_rank(rank, folder):
    """Train with every form of gradient, and of tables that are shared."""
    parallel = pkm.distributed.data_parallel
    for form in FORMS:
        for shared in (False, True):
            net = parallel(disturbed(make_model(form, shared), rank))
            torch.save(train(net, [rank]), f"{folder}/{form}-{shared}-{rank}.pt")
            kinds = {False: torch.Tensor, True: torch.Tensor, "factored": FactoredGradient}
            grad = net.module[1].values.grad
            assert isinstance(grad, kinds[form])
            assert grad.is_sparse == (form is True)
        alone = train(
            make_model(form),
            [rank],
            lambda model: pkm.distributed.average_gradients(model.parameters()),
        )
        torch.save(alone, f"{folder}/{form}-alone-{rank}.pt")


def run_sharded(rank, folder):
    """FSDP2 on all but the values of sparse memories, and on those of dense ones too."""
    for form in FORMS:
        for dtype in (torch.float32, torch.bfloat16):
            net = make_model(form).to(dtype)
            # In one order on all ranks.
            values = [net[1].values, net[3].values] if form else []
            net[0] = fully_shard(net[0])
            net = fully_shard(net, ignored_params=set(values))
            average = functools.partial(average_of, values)
            trained = train(net, [rank], average, dtype=dtype)
            whole = {name: p.full_tensor() if is_dtensor(p) else p for name, p in trained.items()}
            torch.save(whole, f"{folder}/{form}-{dtype}-{rank}.pt")


def average_of(parameters, _):
    pkm.distributed.average_gradients(parameters)


def is_dtensor(parameter):
    return hasattr(parameter, "full_tensor")


def run_unequal(rank, folder):
    """Ranks of which one reads nothing, and one memory that is the whole model."""
    out = {}
    for form in (True, "factored"):
        net = pkm.distributed.data_parallel(make_model(form))
        x = torch.ones(5 * (1 - rank), 8)
        net(x).square().sum().backward()
        out[form] = net.module[1].values.grad.to_dense()
        memory = pkm.ProductKeyMemory(8, **SIZES, sparse_grad=form)
        experts = pkm.distributed.data_parallel(pkm.ProductKeyExperts(8, **SIZES, sparse_grad=form))
        experts(torch.ones(3 + rank, 8)).sum().backward()
        out[f"{form} experts"] = experts.module.inputs.grad.to_dense()
        root = pkm.distributed.data_parallel(memory)
        root(torch.ones(3 + rank, 8)).sum().backward()
        out[f"{form} root"] = memory.values.grad.to_dense()
        assert memory.values.grad.is_sparse == (form is True)
    torch.save(out, f"{folder}/unequal-{rank}.pt")


def run_refused(rank, folder):
    """What is not put right is said."""
    said = []
    wrapped = nn.parallel.DistributedDataParallel(make_model(True))
    frozen = make_model("factored")
    for name, parameter in frozen.named_parameters():
        parameter.requires_grad_("values" in name)
    for wrong in (
        lambda: pkm.distributed.average_sparse_values(wrapped),
        lambda: pkm.distributed.data_parallel(frozen),
    ):
        try:
            wrong()
        except ValueError as error:
            said.append(str(error))
    torch.save(said, f"{folder}/refused-{rank}.pt")
    distributed.barrier()
