"""One model of a study: what is trained, on what, and how."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pkm_triton.perf.records.points import KEYS, require_choice
from pkm_triton.perf.records.row_file import added

from .tokens import check_tokens

TASKS = ("text", "facts")
NORMS = ("batch", "layer", "none")
SOFTMAXES = ("head", "all")


@dataclass(frozen=True)
class Trial:
    """The parameters of one training. Two trials with equal fields are the same trial.

    Attributes:
        task: `text` (a language model) or `facts` (keys and values to be recalled).
        text, text_size, text_sha256: name, bytes and hash of the text; `facts` for facts.
        tokens: `bytes`, or a byte-pair encoding as `bpe1024`; `symbols` for facts.
        facts: how many facts there are; 0 for text.
        layers, dim, attention_heads, context: of the transformer.
        ffn_dim: hidden width of its FFNs.
        norm: `pre` or `post`.
        memory_layers: layers with a memory, counted from 1, as `5` or `6+12`; empty for none.
        interleave: keep the FFN of those layers, and put the memory after it.
        keys: `product` or `flat`.
        num_subkeys: |C|; a memory has |C|² slots.
        heads, top_k, query_dim, query_norm: of the memories.
        batch: sequences a step.
        steps: steps of training.
        warmup: steps until the learning rates are at their highest.
        lr, value_lr: highest learning rates, of everything but memory values and of those.
        clip: largest norm of the gradient.
        sparse_grad: sparse gradients of the values, and Adam on the rows that were read.
        eval_tokens: the most tokens of the test set to evaluate on.
        seed: of parameters and of the order of the data.
        fixed_keys: the memories' keys stay at their random start.
        softmax: over the reads of each `head`, so that heads add up, or over `all` heads' reads.
        tuning: how the trained model is then trained on facts more: `all` (everything trains),
            `adapter-R` (low-rank adapters of rank R of all linear layers) or `slots-T` (the T slots
            of each memory that these facts read more than the first ones); empty for not at all.
        tuning_facts: how many facts more there are.
        tuning_steps, tuning_lr: of that training; values learn faster by the same ratio.

    Raises:
        ValueError: a parameter is out of range.
    """

    task: str = "text"
    text: str = ""
    text_size: int = 0
    text_sha256: str = ""
    tokens: str = "bytes"
    facts: int = 0
    layers: int = 6
    dim: int = 64
    attention_heads: int = 4
    context: int = 128
    ffn_dim: int = 256
    norm: str = "pre"
    memory_layers: str = ""
    interleave: bool = False
    keys: str = "product"
    num_subkeys: int = 128
    heads: int = 4
    top_k: int = 32
    query_dim: int = 64
    query_norm: str = "batch"
    batch: int = 16
    steps: int = 1000
    warmup: int = 100
    lr: float = 2.5e-4
    value_lr: float = 1e-3
    clip: float = 1.0
    sparse_grad: bool = False
    eval_tokens: int = 1 << 17
    seed: int = 0
    fixed_keys: bool = added(3, False)
    softmax: str = added(3, "head")
    tuning: str = added(4, "")
    tuning_facts: int = added(4, 0)
    tuning_steps: int = added(4, 1)
    tuning_lr: float = added(4, 1e-3)

    def __post_init__(self) -> None:
        require_choice("task", self.task, TASKS)
        require_choice("keys", self.keys, KEYS)
        require_choice("query_norm", self.query_norm, NORMS)
        require_choice("norm", self.norm, ("pre", "post"))
        require_choice("softmax", self.softmax, SOFTMAXES)
        if self.softmax == "all" and self.keys == "flat":
            raise ValueError("softmax: 'all' is not allowed for flat keys; allowed: 'head'")
        if self.task == "text":
            check_tokens(self.tokens)
            require_choice("tuning", self.tuning, ("",))
        least = {"facts": int(self.task == "facts"), "seed": 0, "text_size": 0, "query_dim": 2}
        least["tuning_facts"] = int(self.tuned_by[0] != "")
        for field in dataclasses.fields(Trial):
            value = getattr(self, field.name)
            if field.type is int and value < least.get(field.name, 1):
                raise ValueError(
                    f"{field.name}: {value} is too small; at least {least.get(field.name, 1)}"
                )
            if field.type is float and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{field.name}: {value} is not allowed; give a number above 0")
        if self.query_dim % 2:
            raise ValueError(f"query_dim: {self.query_dim} is odd; it is split into two halves")
        if self.dim % self.attention_heads:
            raise ValueError(
                f"dim: {self.dim} is no multiple of the {self.attention_heads} attention_heads"
            )
        if self.num_slots >= 2**31 or self.top_k > self.num_slots:
            raise ValueError(
                f"num_subkeys: {self.num_subkeys} makes {self.num_slots} slots; at least top_k "
                f"({self.top_k}) and less than 2^31 are allowed"
            )
        for number in self.memories:
            if not 1 <= number <= self.layers:
                raise ValueError(
                    f"memory_layers: layer {number} does not exist; allowed: 1 to {self.layers}"
                )
        if len(set(self.memories)) < len(self.memories):
            raise ValueError(f"memory_layers: {self.memory_layers!r} names a layer twice")

    @property
    def num_slots(self) -> int:
        """Slots of a memory."""
        return self.num_subkeys**2

    @property
    def memories(self) -> tuple[int, ...]:
        """Layers with a memory, counted from 1."""
        try:
            return tuple(int(number) for number in self.memory_layers.split("+") if number)
        except ValueError:
            raise ValueError(
                f"memory_layers: {self.memory_layers!r} is not allowed; give numbers as 5 or 6+12"
            ) from None

    @property
    def tuned_by(self) -> tuple[str, int]:
        """The first part of `tuning`, and its number, 0 for none."""
        kind, _, size = self.tuning.partition("-")
        number = int(size) if size.isdecimal() else 0
        if (kind, size) in (("", ""), ("all", "")) or (kind in ("adapter", "slots") and number):
            return kind, number
        raise ValueError(
            f"tuning: {self.tuning!r} is not allowed; give all, adapter-RANK or slots-NUMBER"
        )

    @property
    def key(self) -> tuple[Any, ...]:
        """All parameters."""
        return dataclasses.astuple(self)

    @property
    def name(self) -> str:
        """A file name that no other trial has."""
        digest = hashlib.sha256(json.dumps(dataclasses.asdict(self)).encode()).hexdigest()
        return f"{self.task}-{digest[:16]}"

    def label(self) -> str:
        """A short name for progress lines."""
        memory = "no memory"
        if self.memories:
            more = "" if self.query_norm == "batch" else f" norm={self.query_norm}"
            more += " fixed keys" * self.fixed_keys + " one softmax" * (self.softmax == "all")
            memory = (
                f"{self.keys} |C|={self.num_subkeys} H={self.heads} k={self.top_k}{more} "
                f"at {self.memory_layers}"
            )
        ffn = "" if self.ffn_dim == 4 * self.dim else f" ffn={self.ffn_dim}"
        tuning = f", tuning {self.tuning} lr={self.tuning_lr:g}" if self.tuning else ""
        return f"{self.layers}x{self.dim}{ffn}, {memory}, seed {self.seed}{tuning}"

    def without_memory(self) -> "Trial":
        """The same model with its FFN in every layer; fields of the memory at their defaults."""
        return self._reset(_MEMORY)

    def architecture(self) -> "Trial":
        """The same model, with all that its speed does not depend on at the defaults."""
        return self._reset(_NOT_ARCHITECTURE)

    def before_tuning(self) -> "Trial":
        """The training that the tuning starts from."""
        return self._reset(("tuning", "tuning_steps", "tuning_lr"))

    def _reset(self, names: tuple[str, ...]) -> "Trial":
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        return dataclasses.replace(self, **{name: defaults[name] for name in names})


TEXT_FIELDS = ("text", "text_size", "text_sha256")
"""What the text itself tells."""
_MEMORY = (
    "memory_layers",
    "interleave",
    "sparse_grad",
    "keys",
    "num_subkeys",
    "heads",
    "top_k",
    "query_dim",
    "query_norm",
    "fixed_keys",
    "softmax",
)
_NOT_ARCHITECTURE = (
    *TEXT_FIELDS,
    "steps",
    "warmup",
    "lr",
    "value_lr",
    "clip",
    "sparse_grad",
    "eval_tokens",
    "seed",
    "fixed_keys",
    "tuning",
    "tuning_facts",
    "tuning_steps",
    "tuning_lr",
)


def vocab_size_of(tokens: str) -> int:
    """How many tokens an encoding knows, from its name."""
    return int(tokens[3:]) if tokens.startswith("bpe") else 256


def parse_settings(words: Iterable[str]) -> dict[str, Any]:
    """`steps=500 dim=32` as fields of a trial.

    Raises:
        ValueError: a field is unknown, or a value is not of its type.
    """
    kinds = {field.name: field.type for field in dataclasses.fields(Trial)}
    for found in TEXT_FIELDS:
        del kinds[found]
    yes_no = {"yes": True, "no": False}
    settings: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or name not in kinds:
            raise ValueError(
                f"set: {word!r} is not allowed; give FIELD=VALUE, of {', '.join(kinds)}"
            )
        try:
            settings[name] = yes_no[value] if kinds[name] is bool else kinds[name](value)  # pyright: ignore[reportCallIssue]
        except (ValueError, KeyError):
            raise ValueError(f"set: {value!r} is no value for {name}") from None
    return settings
