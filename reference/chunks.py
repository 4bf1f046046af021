"""Bounded working memory: how many tokens to take at a time."""

from collections.abc import Iterator

# A chunk's largest temporary holds this many elements, or one token's share where that is more.
MAX_TEMPORARY_ELEMENTS = 1 << 22

# What an op allocates at most beside its inputs and results, at float32 and k <= 64: the largest
# temporary and what is derived from it. Indices of reads, O(T · R), come on top in the backward
# pass of the gather.
MAX_WORKING_BYTES = 12 * MAX_TEMPORARY_ELEMENTS


def token_chunks(
    num_tokens: int, elements_per_token: int, most_elements: int | None = None
) -> Iterator[slice]:
    """Slices that cover `num_tokens`, no chunk of more elements than stated, or the bound above."""
    step = max(1, (most_elements or MAX_TEMPORARY_ELEMENTS) // max(1, elements_per_token))
    for start in range(0, num_tokens, step):
        yield slice(start, min(start + step, num_tokens))
