import pytest

from pkm_triton.perf.records.points import Point


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query_dim": 7}, "query_dim: 7 is odd"),
        ({"top_k": 0}, "top_k: 0"),
        ({"top_k": 17, "num_subkeys": 4}, "top_k: 17 is above the 16 slots"),
        ({"num_subkeys": 2**16}, "num_subkeys: 65536"),
        ({"tokens": -1}, "tokens: -1"),
        ({"keys": "round"}, "keys: 'round' is unknown; allowed: product, flat"),
        ({"pass_name": "leap"}, "pass: 'leap'"),
        ({"implementation": "magic"}, "implementation: 'magic'"),
        ({"dtype": "int8"}, "dtype: 'int8'"),
        ({"reads": "normal"}, "reads: 'normal'"),
        ({"query_norm": "weight"}, "query_norm: 'weight'"),
    ],
)
def test_impossible_points_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Point(**changes)


def test_what_the_package_cannot_do_is_said():
    point = Point(implementation="product-key-memory", query_norm="layer")
    assert point.unsupported() is None
    reason = Point(
        implementation="product-key-memory", query_norm="layer", reads="zipf"
    ).unsupported()
    assert reason == "product-key-memory knows reads layer only"
    assert Point(implementation="textbook", reads="zipf").unsupported() is None
