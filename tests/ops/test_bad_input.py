import pytest
import torch

import pkm_triton as pkm

QUERY, SUBKEYS, KEYS = torch.randn(3, 2, 8), torch.randn(2, 2, 9, 4), torch.randn(2, 81, 8)
META = torch.randn(3, 2, 8, device="meta")


@pytest.mark.parametrize(
    ("query", "subkeys", "top_k", "error", "message"),
    [
        (torch.randn(3, 2, 10), SUBKEYS, 5, ValueError, r"query must have shape \[..., 2, 8\]"),
        (torch.randn(3, 3, 8), SUBKEYS, 5, ValueError, r"query must have .*not \[3, 3, 8\]"),
        (torch.randn(8), SUBKEYS, 5, ValueError, r"query must have shape \[..., H, d_q\]"),
        (QUERY, torch.randn(2, 9, 4), 5, ValueError, "subkeys must have shape"),
        (QUERY, torch.randn(2, 3, 9, 4), 5, ValueError, "subkeys must have shape"),
        (QUERY, torch.randn(2, 2, 0, 4), 5, ValueError, "subkeys must have shape"),
        (QUERY, SUBKEYS, 0, ValueError, "top_k is 0"),
        (QUERY, SUBKEYS, 82, ValueError, "top_k is 82, but there are only 81 slots"),
        (QUERY, SUBKEYS, True, ValueError, "top_k is True"),
        (QUERY, SUBKEYS, 1.0, TypeError, "top_k must be an integer, not 1.0"),
        (QUERY.long(), SUBKEYS, 5, TypeError, "query has dtype torch.int64"),
        (QUERY, SUBKEYS.to(torch.complex64), 5, TypeError, "subkeys has dtype torch.complex64"),
        (QUERY.tolist(), SUBKEYS, 5, TypeError, "query must be a tensor"),
        (META, SUBKEYS, 5, ValueError, "one device, but got query on meta, subkeys on cpu"),
        (QUERY, SUBKEYS, torch.tensor(True), ValueError, r"top_k is True, but must be an integer"),
        (QUERY, SUBKEYS, torch.tensor(5.0), TypeError, r"top_k must be an integer, not tensor"),
        (QUERY.to_sparse(), SUBKEYS, 5, TypeError, r"query has layout torch\.sparse_coo, but must"),
        (QUERY.to(torch.float8_e5m2), SUBKEYS, 5, TypeError, r"query has dtype torch\.float8_e5m2"),
    ],
)
def test_product_key_topk(query, subkeys, top_k, error, message):
    with pytest.raises(error, match=message):
        pkm.product_key_topk(query, subkeys, top_k)


@pytest.mark.parametrize(
    ("query", "keys", "top_k", "error", "message"),
    [
        (torch.randn(3, 2, 9), KEYS, 5, ValueError, r"query must have shape \[..., 2, 8\]"),
        (QUERY, torch.randn(81, 8), 5, ValueError, r"keys must have shape \[H, K, d_q\]"),
        (QUERY, torch.randn(2, 0, 8), 5, ValueError, r"keys must have shape \[H, K, d_q\]"),
        (QUERY, KEYS, 82, ValueError, "top_k is 82, but there are only 81 slots"),
        (QUERY, KEYS.int(), 5, TypeError, "keys has dtype torch.int32"),
        (META, KEYS, 5, ValueError, "one device"),
    ],
)
def test_flat_key_topk(query, keys, top_k, error, message):
    with pytest.raises(error, match=message):
        pkm.flat_key_topk(query, keys, top_k)


def test_more_slots_than_int32_holds():
    subkeys = torch.randn(1, 2, 1, 4).expand(1, 2, 46341, 4)
    with pytest.raises(ValueError, match="2147488281 slots are too many"):
        pkm.product_key_topk(torch.randn(1, 1, 8), subkeys, 5)


VALUES, SLOTS, WEIGHTS = torch.randn(20, 4), torch.randint(0, 20, (3, 6)), torch.rand(3, 6)


@pytest.mark.parametrize("sparse_grad", [False, True])
@pytest.mark.parametrize(
    ("values", "slots", "weights", "error", "message"),
    [
        (VALUES, SLOTS[:, :5], WEIGHTS, ValueError, r"same shape, not \[3, 5\] and \[3, 6\]"),
        (VALUES, SLOTS, WEIGHTS[:2], ValueError, "same shape"),
        (VALUES, SLOTS, WEIGHTS.long(), TypeError, "weights has dtype torch.int64"),
        (VALUES, SLOTS.float(), WEIGHTS, TypeError, "slots has dtype torch.float32"),
        (VALUES, SLOTS.short(), WEIGHTS, TypeError, "slots has dtype torch.int16"),
        (VALUES[0], SLOTS, WEIGHTS, ValueError, r"values must have shape \[K, d_v\], not \[4\]"),
        (VALUES.long(), SLOTS, WEIGHTS, TypeError, "values has dtype torch.int64"),
        (VALUES, SLOTS + 20, WEIGHTS, ValueError, r"slots must lie in \[0, 20\)"),
        (VALUES, SLOTS - 20, WEIGHTS, ValueError, r"slots must lie in \[0, 20\)"),
        (VALUES, SLOTS + 2**32, WEIGHTS, ValueError, r"slots must lie in \[0, 20\)"),
        (VALUES[:0], SLOTS, WEIGHTS, ValueError, r"slots must lie in \[0, 0\)"),
        (VALUES, SLOTS.to("meta"), WEIGHTS, ValueError, "slots on meta"),
        (VALUES.to_sparse(), SLOTS, WEIGHTS, TypeError, r"values has layout torch\.sparse_coo"),
        (VALUES, SLOTS.to_sparse(), WEIGHTS, TypeError, r"slots has layout torch\.sparse_coo"),
        (VALUES, SLOTS, WEIGHTS.to_sparse(), TypeError, r"weights has layout torch\.sparse_coo"),
        (VALUES.to(torch.float8_e4m3fn), SLOTS, WEIGHTS, TypeError, r"dtype torch\.float8_e4m3fn"),
        (
            VALUES.to(torch.complex64),
            SLOTS,
            WEIGHTS,
            TypeError,
            r"values has dtype torch\.complex64",
        ),
        (VALUES, SLOTS, WEIGHTS > 0, TypeError, r"weights has dtype torch\.bool"),
        (VALUES, SLOTS.bool(), WEIGHTS, TypeError, r"slots has dtype torch\.bool"),
    ],
)
def test_gather_values(values, slots, weights, sparse_grad, error, message):
    with pytest.raises(error, match=message):
        pkm.gather_values(values, slots, weights, sparse_grad)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_other_layouts():
    with pytest.raises(TypeError, match=r"values has layout torch\.sparse_csr, but"):
        pkm.gather_values(VALUES.to_sparse_csr(), SLOTS, WEIGHTS)
    for layout in (torch.strided, torch.jagged):
        nested = torch.nested.nested_tensor([QUERY[0], QUERY[1]], layout=layout)
        with pytest.raises(TypeError, match="query has layout nested, but must be a dense tensor"):
            pkm.product_key_topk(nested, SUBKEYS, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [1, 7, 64])
@pytest.mark.parametrize("bad", [-1, -(2**31), 20, 2**31 - 1])
def test_int32_slots_are_looked_at_as_they_are_read(dtype, width, bad):
    values, slots = torch.randn(20, width).to(dtype), SLOTS.int()
    slots[1, 2] = bad
    with pytest.raises(ValueError, match=r"slots must lie in \[0, 20\)"):
        pkm.gather_values(values, slots, WEIGHTS)
    with pytest.raises(ValueError, match=r"slots must lie in \[0, 0\)"):
        pkm.gather_values(values[:0], slots, WEIGHTS)
