"""Bounded working memory: how many tokens to take at a time."""

from collections.abc import Iterator

# The largest temporary any function of this folder makes holds this many elements (16 MiB of
# float32), or one token's share where that alone is more.
MAX_TEMPORARY_ELEMENTS = 1 << 22


def token_chunks(num_tokens: int, elements_per_token: int) -> Iterator[slice]:
    """Slices that cover `num_tokens` so that no chunk needs more than the bound above."""
    step = max(1, MAX_TEMPORARY_ELEMENTS // max(1, elements_per_token))
    for start in range(0, num_tokens, step):
        yield slice(start, min(start + step, num_tokens))
