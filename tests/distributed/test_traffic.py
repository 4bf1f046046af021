"""The formula of what ranks send, beside what their collectives moved on gloo."""

import pytest
import torch
from ranks import run_ranks
from sharded_training import make_model
from torch import distributed, nn

import pkm_triton as pkm

traffic = pkm.distributed.traffic


@pytest.mark.slow
@pytest.mark.skipif(not distributed.is_gloo_available(), reason="needs gloo")
@pytest.mark.parametrize("ranks", [2, 4])
def test_formula_is_what_was_moved(tmp_path, ranks):
    run_ranks(
        "import traffic_ranks\ntraffic_ranks.run_traffic(rank, ranks, folder)", tmp_path, ranks
    )


def test_bytes_of_columns():
    """By hand: 4 ranks, 8 tokens each, 2 · 3 reads, 8 columns of bfloat16."""
    layer = pkm.ProductKeyMemory(
        8, num_subkeys=5, heads=2, top_k=3, query_dim=4, device="meta", dtype=torch.bfloat16
    )
    told = traffic(layer, 8, 4, "columns", equal_tokens=True)
    assert told.sent(0, "forward") == 3 * 8 * 6 * (4 + 4) + 3 * 8 * 2 * 2
    assert told.sent(0, "backward") == 3 * 8 * 2 * 2 + 3 * 8 * 6 * 4
    assert told.received(3) == told.sent(3) == told.sent(0)
    narrow = traffic(layer, 8, 4, "columns", equal_tokens=True, narrow_weights=True)
    assert told.sent() - narrow.sent() == 3 * 8 * 6 * 2
    assert "all_to_all | sums | 96 | 96 |" in str(told)


def test_what_is_wrong_is_said():
    model = make_model()
    for wrong, expected in (
        (lambda: traffic(model, 4, 2, "diagonal"), "layout is 'diagonal'"),
        (lambda: traffic(model, 4, (2, 2), "rows"), "mesh has 2 dimensions"),
        (lambda: traffic(model, [4, 4, 4], 2), "tokens has 3 numbers, but there are 2 ranks"),
        (lambda: traffic(model, -1, 2), "tokens is -1"),
        (lambda: traffic(model, [1, -1], 2), r"tokens\[1\] is -1"),
        (lambda: traffic(model, 4, 0), "ranks is 0"),
        (lambda: traffic(model, [3, 4], 2, equal_tokens=True), r"tokens is \[3, 4\]"),
        (lambda: traffic(model, 3, 2, rows_read=[3, 4]), "rows_read is of replicas alone"),
        (lambda: traffic(model, 4, 8), "7 columns, which over 8 ranks"),
        (lambda: traffic(nn.Linear(2, 2), 4, 2), "model has no memory"),
        (
            lambda: traffic(pkm.ProductKeyExperts(8, num_subkeys=5, top_k=3, device="meta"), 4, 2),
            "ProductKeyExperts",
        ),
    ):
        with pytest.raises(ValueError, match=expected):
            wrong()
    with pytest.raises(TypeError, match="narrow_weights must be True or False"):
        traffic(model, 4, 2, narrow_weights=1)  # pyright: ignore[reportArgumentType]
