"""Which ops there are to time, their shapes, and what they must move, by formula."""

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """Sizes of an op; each op uses some of them.

    Attributes:
        tokens: T.
        heads: H.
        num_subkeys: N, |C|; flat keys and tables have K = N² of them.
        query_dim: d_q, width of one head's query.
        top_k: k; a token reads R = H · k slots.
        value_dim: d_v.
        dtype: of queries, keys and values; weights are float32.

    Raises:
        ValueError: a size is out of range, or the dtype unknown.
    """

    tokens: int = 16_384
    heads: int = 4
    num_subkeys: int = 1024
    query_dim: int = 256
    top_k: int = 32
    value_dim: int = 1024
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and value < 1:
                raise ValueError(f"{field.name}: {value} is too small; at least 1 is needed")
        if self.query_dim % 2:
            raise ValueError(f"query_dim: {self.query_dim} is odd; it is split into two halves")
        if self.top_k > self.num_slots or self.num_slots >= 2**31:
            raise ValueError(
                f"num_subkeys: {self.num_subkeys} makes {self.num_slots} slots; at least top_k "
                f"({self.top_k}) and less than 2^31 are allowed"
            )
        if self.dtype not in _ITEM_BYTES:
            raise ValueError(f"dtype: {self.dtype!r} is unknown; allowed: {', '.join(_ITEM_BYTES)}")

    @property
    def num_slots(self) -> int:
        """K."""
        return self.num_subkeys**2


_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
SHAPES = {
    "usual": Shape(),
    "large": Shape(num_subkeys=4096, top_k=64),
    "decode": Shape(tokens=1),
    "tiny": Shape(4, 2, 8, 8, 4, 16, "float32"),
}


@dataclass(frozen=True)
class Op:
    """An op that can be timed.

    Attributes:
        formula: what it must move at least, in words.
        check: names of the checks (`pkm-perf check --only`) that must pass before it is timed.
    """

    formula: str
    check: str

    def bytes(self, name: str, shape: Shape) -> int:
        """`formula`, computed: s bytes an element, 4 a score, a weight and a slot."""
        s, reads = _ITEM_BYTES[shape.dtype], shape.heads * shape.top_k * shape.tokens
        queries = s * shape.tokens * shape.heads * shape.query_dim
        subkeys = s * shape.heads * shape.num_subkeys * shape.query_dim
        keys = s * shape.heads * shape.num_slots * shape.query_dim
        output = s * shape.tokens * shape.value_dim
        # A slot that is read again may come from a cache: so many rows, of slots drawn evenly.
        slots = shape.num_slots
        rows = s * round(slots - slots * (1 - 1 / slots) ** reads) * shape.value_dim
        every = s * min(reads, slots) * shape.value_dim
        table = s * slots * shape.value_dim
        return {
            "product_key_topk": queries + subkeys + 8 * reads,
            "product_key_topk_gradient": 2 * (queries + subkeys) + 8 * reads,
            "flat_key_topk": queries + keys + 8 * reads,
            "flat_key_topk_gradient": 2 * (queries + keys) + 8 * reads,
            "gather_values": rows + output + 8 * reads,
            "gather_values_dense_gradient": rows + table + output + 12 * reads,
            "gather_values_sparse_gradient": 2 * rows + output + 12 * reads,
            "sample_values": rows + output + 8 * reads,
            "scatter_values": table + output + 8 * reads,
            # The gradient in; the parameter and two float32 moments in and out.
            "sparse_adam": every + 2 * every + 16 * every // s,
            "scatter_adam": output + 8 * reads + 2 * rows + 16 * rows // s,
        }[name]


_DISTINCT = "K · (1 - (1 - 1 / K)^(T · R))"
OPS = {
    "product_key_topk": Op("queries + sub-keys + 8 · T · R", "Lookup: product"),
    "product_key_topk_gradient": Op("2 · (queries + sub-keys) + 8 · T · R", "gradients, product"),
    "flat_key_topk": Op("queries + keys + 8 · T · R", ", flat"),
    "flat_key_topk_gradient": Op("2 · (queries + keys) + 8 · T · R", "gradients, flat"),
    "gather_values": Op(f"{_DISTINCT} rows + output + 8 · T · R", "Gather: T="),
    "gather_values_dense_gradient": Op(
        f"{_DISTINCT} rows + table + output + 12 · T · R", "dense gradient"
    ),
    "gather_values_sparse_gradient": Op(
        f"2 · {_DISTINCT} rows + output + 12 · T · R", "sparse gradient"
    ),
    "sample_values": Op(f"{_DISTINCT} rows + tokens + 8 · T · R", "Sample: "),
    "scatter_values": Op("table + tokens + 8 · T · R", "Scatter: "),
    "sparse_adam": Op(
        "min(T · R, K) rows, 3 times in their dtype and 4 times in float32", "sparse gradient"
    ),
    "scatter_adam": Op(
        f"{_DISTINCT} rows, twice in their dtype and 4 times in float32, + output + 8 · T · R",
        "factored gradient",
    ),
}


def parse_shape(name: str, settings: list[str]) -> Shape:
    """A named shape, with some of its sizes set as `tokens=64`.

    Raises:
        ValueError: the name or a size is unknown, or a value not allowed.
    """
    if name not in SHAPES:
        raise ValueError(f"shape: {name!r} is unknown; allowed: {', '.join(SHAPES)}")
    kinds: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(Shape)}
    changed: dict[str, Any] = {}
    for word in settings:
        field, equals, value = word.partition("=")
        if not equals or field not in kinds:
            raise ValueError(
                f"set: {word!r} is not allowed; give SIZE=VALUE, of {', '.join(kinds)}"
            )
        try:
            changed[field] = kinds[field](value)
        except ValueError:
            raise ValueError(f"set: {value!r} is no value for {field}") from None
    return dataclasses.replace(SHAPES[name], **changed)
