"""Bytes or a small byte-pair encoding: documents to a stream of token numbers."""

import re
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

DTYPE = torch.int32


class Tokens(Protocol):
    """How a text becomes tokens.

    Attributes:
        name: as in `make_tokens`.
        vocab_size: tokens known.
        lengths: int64 [vocab_size], bytes that each token stands for.
    """

    name: str
    vocab_size: int
    lengths: Tensor

    def encode(self, documents: Sequence[bytes]) -> Tensor:
        """All documents end to end, int32 [tokens]."""
        ...


class Bytes:
    """One token a byte."""

    name = "bytes"
    vocab_size = 256
    lengths = torch.ones(256, dtype=torch.int64)

    def encode(self, documents: Sequence[bytes]) -> Tensor:
        """All documents end to end, int32 [tokens]."""
        return torch.frombuffer(bytearray(b"".join(documents)), dtype=torch.uint8).to(DTYPE)


class BytePairs:
    """Byte-pair encoding of `vocab_size` tokens, learned from documents (package `tokenizers`).

    Loses nothing: every byte is a token of its own, too.

    Raises:
        ValueError: tokenizers is not installed, or the documents are too few for the vocabulary.
    """

    SAMPLE_BYTES = 4_000_000
    """What the encoding is learned from: the first documents, up to so many bytes."""

    def __init__(self, vocab_size: int, documents: Sequence[bytes]) -> None:
        try:
            import tokenizers
        except ImportError as error:
            raise ValueError(
                f"tokens: 'bpe{vocab_size}' needs the package tokenizers "
                "(pip install 'pkm-triton[studies]'); 'bytes' needs none"
            ) from error
        self.name = f"bpe{vocab_size}"
        self.vocab_size = vocab_size
        # One character a byte, so that any bytes can be encoded, and lengths are known.
        self._tokenizer: Any = tokenizers.ByteLevelBPETokenizer()
        sample, size = [], 0
        for document in documents:
            if size >= self.SAMPLE_BYTES:
                break
            sample.append(document.decode("latin-1"))
            size += len(document)
        self._tokenizer.train_from_iterator(sample, vocab_size=vocab_size, show_progress=False)
        if self._tokenizer.get_vocab_size() != vocab_size:
            raise ValueError(
                f"tokens: the text is too short for {vocab_size} tokens; it makes "
                f"{self._tokenizer.get_vocab_size()}"
            )
        # Inside, a byte from 128 on is a character of two: the second of them is not counted.
        high = (self._tokenizer.encode(chr(byte)).tokens for byte in range(128, 256))
        second = {"".join(tokens)[1] for tokens in high}
        words = (self._tokenizer.id_to_token(token) for token in range(vocab_size))
        self.lengths = torch.tensor([sum(c not in second for c in word) for word in words])

    def encode(self, documents: Sequence[bytes]) -> Tensor:
        """All documents end to end, int32 [tokens]."""
        texts = [document.decode("latin-1") for document in documents]
        encoded = self._tokenizer.encode_batch(texts)
        return torch.cat([torch.tensor(each.ids, dtype=DTYPE) for each in encoded])


def check_tokens(name: str) -> str:
    """`name`, where it is "bytes" or "bpe" with a number.

    Raises:
        ValueError: it is not.
    """
    match = re.fullmatch(r"bpe(\d+)", name)
    if name != "bytes" and (match is None or int(match[1]) < 257):
        raise ValueError(
            f"tokens: {name!r} is unknown; allowed: bytes, or bpe and a vocabulary size above 256, "
            "as bpe1024"
        )
    return name


def make_tokens(name: str, documents: Sequence[bytes]) -> Tokens:
    """Tokens by name, learned from `documents` where there is something to learn.

    Raises:
        ValueError: the name is unknown, a package is missing, or the text too short.
    """
    if check_tokens(name) == "bytes":
        return Bytes()
    return BytePairs(int(name[3:]), documents)
