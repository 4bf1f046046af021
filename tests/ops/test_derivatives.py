"""Derivatives of every order and mode: of the ops, and of the layers that are made of them."""

import itertools

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import pkm_triton as pkm
from pkm_triton.ops import lookup_operators, table_operators

# torch scripts its own rules of forward mode when they are first asked for.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning:torch")

DOUBLE = {"dtype": torch.float64}
SLOTS = torch.tensor([[0, 3, 3, 8], [8, 1, 2, 0], [5, 5, 5, 5]])


def make():
    """Of every op: a function of its two floating arguments, and those."""
    values, weights, x = torch.randn(9, 3, **DOUBLE), torch.rand(3, 4, **DOUBLE), torch.randn(3, 3)
    query, subkeys = torch.randn(3, 2, 4, **DOUBLE), torch.randn(2, 2, 4, 2, **DOUBLE)
    keys = torch.randn(2, 11, 4, **DOUBLE)
    return {
        "gather": (lambda v, w: pkm.gather_values(v, SLOTS, w), (values, weights)),
        "gather sparse": (lambda v, w: pkm.gather_values(v, SLOTS, w, True), (values, weights)),
        "sample": (lambda v, x: pkm.sample_values(v, SLOTS, x), (values, x.double())),
        "scatter": (lambda w, x: pkm.scatter_values(SLOTS, w, x, 9), (weights, x.double())),
        "scatter sparse": (
            lambda w, x: pkm.scatter_values(SLOTS, w, x, 9, sparse=True).to_dense(),
            (weights, x.double()),
        ),
        "product keys": (lambda q, k: pkm.product_key_topk(q, k, 5)[0], (query, subkeys)),
        "flat keys": (lambda q, k: pkm.flat_key_topk(q, k, 5)[0], (query, keys)),
    }


OPS = list(make())
DENSE = [name for name in OPS if "sparse" not in name]


def leaves(tensors):
    return [tensor.clone().requires_grad_() for tensor in tensors]


def difference(function, inputs, tangents, step=1e-6):
    """The tangent of a function, by central differences."""
    ends = [
        [a + sign * step * t for a, t in zip(inputs, tangents, strict=True)] for sign in (1, -1)
    ]
    return (function(*ends[0]) - function(*ends[1])) / (2 * step)


@pytest.mark.parametrize("name", OPS)
def test_first_derivatives(name):
    function, inputs = make()[name]
    if name == "gather sparse":
        # The weights; the values' are those of the dense form, tested below.
        inputs = (inputs[0], inputs[1].clone().requires_grad_())
        assert gradcheck(function, inputs)
    else:
        assert gradcheck(function, leaves(inputs))
    if name in DENSE:
        assert gradcheck(
            function,
            leaves(inputs),
            check_forward_ad=True,
            check_batched_grad=True,
            check_batched_forward_grad=True,
        )


@pytest.mark.parametrize("name", [n for n in OPS if n != "gather sparse"])
def test_second_derivatives(name):
    function, inputs = make()[name]
    assert gradgradcheck(function, leaves(inputs))
    if name in DENSE:
        assert gradgradcheck(function, leaves(inputs), check_fwd_over_rev=True)


@pytest.mark.parametrize("name", DENSE)
def test_third_derivative(name):
    function, inputs = make()[name]

    def second(*inputs):
        first = torch.autograd.grad(function(*inputs).pow(3).sum(), inputs, create_graph=True)
        total = sum(each.square().sum() for each in first)
        return torch.autograd.grad(total, inputs, create_graph=True)

    assert gradcheck(second, leaves(inputs), atol=1e-3, rtol=1e-3, eps=1e-5)


@pytest.mark.parametrize("name", [n for n in OPS if n != "scatter sparse"])
def test_forward_mode(name):
    function, inputs = make()[name]
    tangents = [torch.randn_like(each) for each in inputs]
    expected = difference(function, inputs, tangents)
    out, tangent = jvp(function, inputs, tuple(tangents))
    torch.testing.assert_close(out, function(*inputs))
    torch.testing.assert_close(tangent, expected, atol=1e-6, rtol=1e-6)
    for index in (0, 1):  # of one argument alone
        with forward_ad.dual_level():
            dual = list(inputs)
            dual[index] = forward_ad.make_dual(inputs[index], tangents[index])
            tangent = forward_ad.unpack_dual(function(*dual)).tangent
        alone = [t if i == index else torch.zeros_like(t) for i, t in enumerate(tangents)]
        expected = difference(function, inputs, alone)
        torch.testing.assert_close(tangent, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", DENSE)
def test_functional_gradients(name):
    function, inputs = make()[name]
    args = leaves(inputs)
    expected = torch.autograd.grad(function(*args).sin().sum(), args)
    found = grad(lambda *a: function(*a).sin().sum(), argnums=(0, 1))(*inputs)
    pulled = vjp(function, *inputs)[1](function(*inputs).cos())
    for one, other, true in zip(found, pulled, expected, strict=True):
        torch.testing.assert_close(one, true)
        torch.testing.assert_close(other, true)
    for argnum in (0, 1):
        forward = jacfwd(function, argnums=argnum)(*inputs)
        torch.testing.assert_close(forward, jacrev(function, argnums=argnum)(*inputs))
        curvature = hessian(lambda *a: function(*a).sin().sum(), argnums=argnum)(*inputs)
        size = inputs[argnum].numel()
        torch.testing.assert_close(
            curvature.reshape(size, size),
            torch.autograd.functional.hessian(
                lambda a, i=argnum: function(*inputs[:i], a, *inputs[i + 1 :]).sin().sum(),
                inputs[argnum],
            ).reshape(size, size),
        )


BATCHED_OPS = {
    "gather": (pkm.gather_values, ((9, 3), SLOTS, (3, 4)), ()),
    "sample": (pkm.sample_values, ((9, 3), SLOTS, (3, 3)), ()),
    "scatter": (pkm.scatter_values, (SLOTS, (3, 4), (3, 3)), (9,)),
    "product keys": (pkm.product_key_topk, ((3, 2, 4), (2, 2, 4, 2)), (5,)),
    "flat keys": (pkm.flat_key_topk, ((3, 2, 4), (2, 11, 4)), (5,)),
}
BATCHES = [
    (name, dims)
    for name, (_, inputs, _) in BATCHED_OPS.items()
    for dims in itertools.product((0, -1, None), repeat=len(inputs))
    if any(dim is not None for dim in dims)
]


@pytest.mark.parametrize(("name", "dims"), BATCHES, ids=str)
def test_vmap_equals_a_loop(name, dims):
    op, forms, rest = BATCHED_OPS[name]
    batch = []
    for form, dim in zip(forms, dims, strict=True):
        size = 1 if dim is None else 6
        many = [
            torch.randn(form, **DOUBLE)
            if isinstance(form, tuple)
            else torch.randint(0, 9, form.shape, dtype=torch.int32)
            for _ in range(size)
        ]
        batch.append(many[0] if dim is None else torch.stack(many, dim))
    found = vmap(lambda *each: op(*each, *rest), dims)(*batch)
    loop = [
        op(
            *(a if d is None else a.select(d, i) for a, d in zip(batch, dims, strict=True)),
            *rest,
        )
        for i in range(6)
    ]
    if isinstance(found, tuple):
        torch.testing.assert_close(found[0], torch.stack([scores for scores, _ in loop]))
        assert torch.equal(found[1], torch.stack([slots for _, slots in loop]))
    else:
        torch.testing.assert_close(found, torch.stack(loop))


def test_vmap_makes_one_call(monkeypatch):
    calls = []
    names = ("gather_values", "sample_values", "scatter_values", "product_key_topk")
    for name in names:
        operators = lookup_operators if name == "product_key_topk" else table_operators
        run = getattr(operators, name)
        monkeypatch.setattr(
            operators, name, lambda *a, run=run, name=name: (calls.append(name), run(*a))[1]
        )
    tables, x, weights = torch.randn(6, 9, 3), torch.randn(3, 3), torch.rand(3, 4)
    vmap(pkm.gather_values, (0, None, None))(tables, SLOTS, weights)
    vmap(pkm.sample_values, (0, None, None))(tables, SLOTS, x)
    vmap(pkm.scatter_values, (None, None, 0, None))(SLOTS, weights, torch.randn(6, 3, 3), 9)
    query, subkeys = torch.randn(3, 2, 4), torch.randn(6, 2, 2, 4, 2)
    vmap(pkm.product_key_topk, (None, 0, None))(query, subkeys, 5)
    assert calls == list(names)
    values = torch.randn(9, 3, requires_grad=True)
    out = pkm.gather_values(values, SLOTS, weights)
    calls.clear()
    vmap(lambda g: torch.autograd.grad(out, values, g)[0])(torch.randn(6, 3, 3))
    assert calls == ["scatter_values"]


@pytest.mark.parametrize(("batch", "slot"), [(0, 9), (1, -1)])
def test_vmap_with_a_slot_out_of_range(batch, slot):
    """Of one table, where the next or the last one's rows would be."""
    tables, slots, weights = torch.randn(2, 9, 3), torch.ones(2, 1, 2).int(), torch.rand(1, 2)
    slots[batch, 0, 1] = slot
    with pytest.raises(ValueError, match="slots must lie in"):
        vmap(pkm.gather_values, (0, 0, None))(tables, slots, weights)


def test_vmap_of_more_rows_than_int32_counts():
    tables, weights = torch.randn(1, 3).expand(3, 2**30, 3), torch.rand(3, 4)
    with pytest.raises(ValueError, match=r"makes one of 3 tables of 1073741824 rows.*chunk_size"):
        vmap(lambda v: pkm.gather_values(v, SLOTS, weights))(tables)


def test_per_sample_gradients():
    values, weights = torch.randn(9, 3, **DOUBLE), torch.rand(3, 4, **DOUBLE)

    def loss(values, slots, weights):
        return pkm.gather_values(values, slots, weights).sin().sum()

    found = vmap(grad(loss, argnums=(0, 2)), (None, 0, 0))(values, SLOTS, weights)
    for i in range(3):
        alone = grad(loss, argnums=(0, 2))(values, SLOTS[i], weights[i])
        for one, other in zip(found, alone, strict=True):
            torch.testing.assert_close(one[i], other)


SIZES = {"num_subkeys": 5, "heads": 2, "top_k": 3, "query_dim": 4}


@pytest.mark.parametrize("norm", [None, "layer", "batch"])
@pytest.mark.parametrize("kind", [pkm.ProductKeyMemory, pkm.FlatKeyMemory])
def test_layer_in_forward_mode(kind, norm):
    layer = kind(4, **SIZES, query_norm=norm, **DOUBLE).eval()
    x, tangent = torch.randn(6, 4, **DOUBLE), torch.randn(6, 4, **DOUBLE)
    found = jvp(layer, (x,), (tangent,))[1]
    expected = difference(layer, (x,), (tangent,)).detach()
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", [pkm.ProductKeyMemory, pkm.FlatKeyMemory])
def test_layer_twice_and_by_sample(kind):
    layer = kind(4, **SIZES, query_norm="layer", **DOUBLE).eval()
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    x = torch.randn(5, 4, **DOUBLE)
    assert gradgradcheck(layer, (x.clone().requires_grad_(),), atol=1e-4)

    def loss(parameters, x):
        return functional_call(layer, parameters, (x,)).square().sum()

    each = vmap(grad(loss), (None, 0))(parameters, x)
    whole = grad(loss)(parameters, x)
    layer(x).square().sum().backward()
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(whole[name], parameter.grad, msg=name)
        torch.testing.assert_close(each[name].sum(0), parameter.grad, msg=name)


def test_gradient_penalty_of_a_sparse_gradient():
    """The norm of a table's sparse gradient, differentiated: as of the dense one."""
    values, weights = torch.randn(9, 3, **DOUBLE), torch.rand(3, 4, **DOUBLE)
    found = []
    for sparse_grad in (False, True):
        args = leaves((values, weights))
        out = pkm.gather_values(args[0], SLOTS, args[1], sparse_grad).pow(3).sum()
        (first,) = torch.autograd.grad(out, args[0], create_graph=True)
        elements = first.coalesce().values() if sparse_grad else first
        second = torch.autograd.grad(elements.square().sum(), args)
        found.append([each.to_dense() for each in second])
    for name, dense, sparse in zip(("values", "weights"), *found, strict=True):
        torch.testing.assert_close(dense, sparse, msg=name)


def test_sparse_result_against_a_sparse_gradient_of_other_rows():
    """What comes back for a sparse table may lack rows, or have rows that nobody read."""
    weights, x = leaves((torch.rand(3, 4, **DOUBLE), torch.randn(3, 3, **DOUBLE)))
    other = torch.zeros(9, 3, **DOUBLE)
    other[[1, 3, 4, 8]] = torch.randn(4, 3, **DOUBLE)
    found = []
    for sparse in (False, True):
        table = pkm.scatter_values(SLOTS, weights, x, 9, sparse=sparse)
        cotangent = other.to_sparse(1) if sparse else other
        found.append(torch.autograd.grad(table, (weights, x), cotangent))
    for name, dense, sparse in zip(("weights", "x"), *found, strict=True):
        torch.testing.assert_close(dense, sparse, msg=name)


def test_what_cannot_be_right_says_so():
    values, weights = leaves((torch.randn(9, 3), torch.rand(3, 4)))
    loss = pkm.gather_values(values, SLOTS, weights, "factored").square().sum()
    with pytest.raises(RuntimeError, match=r"kept as its factors .* differentiated again"):
        torch.autograd.grad(loss, values, create_graph=True)
    with pytest.raises(RuntimeError, match=r"nor be made under torch\.func"):
        grad(lambda v: pkm.gather_values(v, SLOTS, weights, "factored").sum())(values)
    # The weights' gradient has no factors.
    loss = pkm.gather_values(values.detach(), SLOTS, weights, "factored").square().sum()
    (first,) = torch.autograd.grad(loss, weights, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), weights)
    assert second.isfinite().all()
    with pytest.raises(RuntimeError, match="has no derivative"):
        pkm.scatter_values(SLOTS, weights, torch.randn(3, 3), 9, sparse="factored")
    for sparse_grad in (True, "factored"):
        out = pkm.gather_values(values, SLOTS, weights, sparse_grad)
        with pytest.raises(RuntimeError, match=r"no batch of sparse gradients .*: use sparse_grad"):
            torch.autograd.grad(out, weights, torch.randn(2, 3, 3), is_grads_batched=True)
    x = torch.randn(2, 3, 3)
    with pytest.raises(RuntimeError, match="no batch of sparse tensors: use"):
        vmap(lambda x: pkm.scatter_values(SLOTS, weights, x, 9, sparse=True))(x)
    with pytest.raises(RuntimeError, match="no forward mode of sparse tensors: use"):
        jvp(lambda x: pkm.scatter_values(SLOTS, weights, x, 9, sparse=True), (x[0],), (x[1],))


@pytest.mark.parametrize("form", ["mixed", "half"])
def test_mixed_dtypes_keep_their_own(form):
    """Tangents and gradients of either order have the dtypes of what they belong to."""
    half = torch.bfloat16
    values = torch.randn(9, 3).to(half).requires_grad_()
    weights = torch.rand(3, 4).to(torch.float32 if form == "mixed" else half).requires_grad_()
    out = pkm.gather_values(values, SLOTS, weights)
    first = torch.autograd.grad(out.float().square().sum(), (values, weights), create_graph=True)
    second = torch.autograd.grad(sum(g.float().square().sum() for g in first), (values, weights))
    assert [g.dtype for g in first] == [g.dtype for g in second] == [half, weights.dtype]
    x = torch.randn(3, 3, requires_grad=True)
    products = pkm.sample_values(values, SLOTS, x)
    assert products.dtype == torch.float32
    grads = torch.autograd.grad(products.sum(), (values, x))
    assert [g.dtype for g in grads] == [half, torch.float32]
    # Not rounded on the way to half precision.
    torch.testing.assert_close(grads[1], values.float()[SLOTS].sum(1))
    query, subkeys = torch.randn(3, 2, 4).to(half), torch.randn(2, 2, 4, 2)
    tangent = jvp(lambda q, k: pkm.product_key_topk(q, k, 5)[0], (query, subkeys), (query, subkeys))
    torch.testing.assert_close(tangent[1], 2 * tangent[0])
