"""Training steps with all three forms of the values' gradient: they must agree."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import pkm_triton as pkm
from pkm_triton.gradients import FactoredGradient
from pkm_triton.optim import SparseAdam

FORMS = [True, "factored"]
SIZES = {"num_subkeys": 6, "heads": 2, "top_k": 3, "query_dim": 4, "query_norm": "layer"}


class Model(nn.Module):
    """Two memories, that may share a table, with different numbers of reads."""

    def __init__(self, sparse_grad, shared=False):
        super().__init__()
        torch.manual_seed(3)
        self.first = pkm.ProductKeyMemory(8, **SIZES, sparse_grad=sparse_grad)
        self.linear = nn.Linear(8, 8)
        self.second = pkm.ProductKeyMemory(8, **SIZES | {"top_k": 5}, sparse_grad=sparse_grad)
        if shared:
            self.second.values = self.first.values

    def forward(self, x):
        x = x + self.first(x)
        return self.second(self.linear(x).tanh())


def loss_of(model, seed=0, tokens=7):
    x = torch.randn(tokens, 8, generator=torch.Generator().manual_seed(seed))
    return model(x).square().sum()


def optimiser_of(model, **options):
    # A large eps: else a gradient of nearly nothing makes a whole step either way.
    return SparseAdam(pkm.param_groups(model, 0.01, 0.1), eps=1e-3, **options)


def assert_same(model, other):
    for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, msg=name)


def train(model, steps=3, micro_batches=1, run=loss_of, **options):
    """Some steps, the gradient of each over several backward passes."""
    optimiser = optimiser_of(model, **options)
    for step in range(steps):
        optimiser.zero_grad()
        for micro_batch in range(micro_batches):
            run(model, 10 * step + micro_batch).backward()
        optimiser.step()
    return model


def sparse_reference(shared=False, **options):
    """The same training on a coalesced dense gradient, whose touched rows alone are given on."""
    model = Model(False, shared)
    optimiser = optimiser_of(model)
    for step in range(3):
        optimiser.zero_grad()
        for micro_batch in range(options.get("micro_batches", 1)):
            loss_of(model, 10 * step + micro_batch).backward()
        for layer in {id(m.values): m for m in (model.first, model.second)}.values():
            rows = layer.values.grad.abs().sum(1).nonzero().T
            layer.values.grad = torch.sparse_coo_tensor(
                rows, layer.values.grad[rows[0]], layer.values.shape, check_invariants=True
            )
        optimiser.step()
    return model


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("shared", [False, True], ids=["own tables", "shared table"])
@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_all_reads_add_up_before_one_step(form, shared, micro_batches):
    model = train(Model(form, shared), micro_batches=micro_batches)
    assert_same(model, sparse_reference(shared, micro_batches=micro_batches))
    if form == "factored":
        gathers = micro_batches * (2 if shared else 1)
        assert isinstance(model.first.values.grad, FactoredGradient)
        assert len(model.first.values.grad.reads) == gathers


@pytest.mark.parametrize("form", [False, *FORMS])
def test_repeats_to_the_bit(form):
    one, two = (train(Model(form, True), micro_batches=2) for _ in range(2))
    for (name, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("form", FORMS)
def test_non_reentrant_checkpointing(form):
    def run(model, seed):
        x = torch.randn(7, 8, generator=torch.Generator().manual_seed(seed))
        return checkpoint(model, x, use_reentrant=False).square().sum()

    assert_same(train(Model(form), run=run), train(Model(form)))


@pytest.mark.parametrize("form", FORMS)
def test_grad_scaler(form):
    """Its steps are those without it, and an infinite gradient skips one."""
    model, plain = Model(form), Model(form)
    optimiser = optimiser_of(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(3):
        optimiser.zero_grad()
        scaler.scale(loss_of(model, 10 * step)).backward()
        scaler.step(optimiser)
        scaler.update()
    assert_same(model, train(plain))
    before = copy.deepcopy(model)
    optimiser.zero_grad()
    scaler.scale(loss_of(model) * torch.inf).backward()
    scaler.step(optimiser)
    scaler.update()
    assert_same(model, before)
    assert scaler.get_scale() == 2.0**9


def test_unscaling_leaves_the_graphs_tensors_alone():
    model = Model("factored")
    optimiser = optimiser_of(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(loss_of(model)).backward()
    (part,) = model.first.values.grad.reads
    before, scaled = part.grad_output.clone(), model.first.values.grad.to_dense()
    scaler.unscale_(optimiser)
    assert torch.equal(part.grad_output, before)
    torch.testing.assert_close(model.first.values.grad.to_dense(), scaled / 4)


@pytest.mark.slow
# The compiler's own imports warn, and its look at what goes between graphs.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.filterwarnings(r"ignore:::torch\.(_inductor|jit|_dynamo|utils)")
@pytest.mark.parametrize("form", [False, *FORMS])
def test_compile_a_whole_step(form):
    torch.compiler.reset()
    model, plain = Model(form), Model(form)
    optimiser = optimiser_of(model)

    @torch.compile
    def step(x):
        optimiser.zero_grad()
        model(x).square().sum().backward()
        optimiser.step()

    for index in range(3):
        step(torch.randn(7, 8, generator=torch.Generator().manual_seed(10 * index)))
    assert_same(model, train(plain))


class TestWhatCannotTakeFactors:
    """Each says so, and none is silently wrong."""

    @pytest.fixture
    def model(self):
        model = Model("factored")
        loss_of(model).backward()
        return model

    @pytest.mark.parametrize(
        "kind", [torch.optim.Adam, torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad]
    )
    def test_other_optimisers(self, model, kind):
        with pytest.raises(NotImplementedError, match=r"sparse_grad='factored'.*optim\.SparseAdam"):
            kind([model.first.values], lr=0.1).step()

    def test_torchs_sparse_adam(self, model):
        with pytest.raises(RuntimeError, match="does not support dense gradients"):
            torch.optim.SparseAdam([model.first.values]).step()

    def test_a_table_with_gradients_of_two_kinds(self):
        model = Model("factored", shared=True)
        model.second.sparse_grad = False
        with pytest.raises(NotImplementedError, match="all gathers of one table"):
            loss_of(model).backward()

    @pytest.mark.parametrize(
        "wrong",
        [
            lambda grad: grad * torch.ones(36, 8),
            lambda grad: torch.ones(36, 8) * grad,
            lambda grad: grad * grad,
            lambda grad: grad + torch.ones(36, 8),
            lambda grad: torch.ones(36, 8) + grad,
            lambda grad: grad + 1,
            lambda grad: grad - grad,
            lambda grad: 2 / grad,
            lambda grad: grad @ torch.ones(8, 8),
            lambda grad: grad.sum(),
            lambda grad: grad[0],
            lambda grad: grad.norm(dim=0),
            lambda grad: grad.norm(p=0),
            lambda grad: torch.ones(36, 8).copy_(grad),
            lambda grad: torch._foreach_mul_([torch.ones(36, 8)], [grad]),
        ],
    )
    def test_arithmetic(self, model, wrong):
        grad = model.first.values.grad
        before = grad.to_dense()
        with pytest.raises(NotImplementedError, match="factors"):
            wrong(grad)
        assert torch.equal(grad.to_dense(), before)


def test_factors_as_ordinary_gradients():
    models = {form: Model(form, True) for form in (False, True, "factored")}
    for model in models.values():
        loss_of(model).backward()
        loss_of(model, 1).backward()
    dense, sparse, factored = (model.first.values.grad for model in models.values())
    torch.testing.assert_close(factored.to_dense(), dense)
    assert factored.to_sparse().is_coalesced()
    assert torch.equal(factored.to_sparse().indices(), sparse.coalesce().indices())
    assert (factored.shape, factored.dtype, factored.device) == (
        dense.shape, dense.dtype, dense.device,
    )  # fmt: skip
    assert repr(factored) == "FactoredGradient(shape=[36, 8], gathers=4)"
    nothing = Model("factored")
    loss_of(nothing, tokens=0).backward()
    assert nothing.first.values.grad.to_dense().count_nonzero() == 0
    optimiser_of(nothing).step()


@pytest.mark.parametrize("sparse_grad", ["fused", None, 1])
def test_unknown_forms_are_refused(sparse_grad):
    with pytest.raises(ValueError, match=f"sparse_grad is {sparse_grad!r}"):
        pkm.ProductKeyMemory(8, **SIZES, sparse_grad=sparse_grad)
