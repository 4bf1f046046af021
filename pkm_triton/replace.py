"""Put memories in the place of feed-forward networks, in any model."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from ._checks import check_integer
from ._ffn import candidates, check_called_as_a_map, check_widths, memory_dtype
from ._layer_checks import check_list, check_module, make_module
from ._padding import hand_on_padding
from .memory import _KeyValueMemory


def check_layers(name: str, layers: Sequence[int], num_layers: int) -> list[int]:
    """`layers` are numbers from 1 to num_layers, each once; returned in order."""
    numbers = [check_integer(name, layer, 1) for layer in check_list(name, layers)]
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"{name} is {list(layers)}, but a layer may be named only once")
    for number in numbers:
        if number > num_layers:
            raise ValueError(
                f"{name} names layer {number}, but the model has {num_layers} layers, counted "
                "from 1"
            )
    return sorted(numbers)


def replace_ffn(
    model: nn.Module,
    layers: Sequence[int],
    make_memory: Callable[[], nn.Module],
    ffn: str = "mlp",
) -> list[nn.Module]:
    """Replace the feed-forward network of some layers of a model by memories, in place (paper 4).

    The model's layers are its one `nn.ModuleList` whose members have the module `ffn`: "mlp" in
    Hugging Face's GPT-2, Llama and their like. What the layer does around its FFN, residual sum
    and norms, stays. Torch's own `nn.TransformerEncoderLayer` and `nn.TransformerDecoderLayer`
    need no name: the memory takes the place of the whole feed-forward block.

    The mask that the attention beside a memory is given reaches the memory too (`attention_mask`
    in Hugging Face's models, `key_padding_mask` in torch's), so that padding enters no batch
    statistics; not so under flex attention or `nn.DataParallel`, which are warned of, and a layer
    without attention knows of no padding. A plain `from_pretrained` of what `save_pretrained` wrote
    silently drops the memories: use `pkm_triton.hf`, or `save_with_memory`.

    The FFN must be a module from x to y. Those of gpt-oss return a pair, BLOOM's takes the residual
    too, BERT's and OPT's are spread over two modules: they are refused, as far as the source of the
    layer and a run of the FFN on the meta device tell.

    Args:
        model: holds the layers; of an encoder-decoder give the part that is meant.
        layers: which, counted from 1 as in the paper (see `memory_layers`).
        make_memory: makes one memory, [..., dim] to [..., dim]; called once a layer, in order.
        ffn: name of the FFN within a layer, with dots for one further down.

    Returns:
        The memories, in the order of the layers; each has been moved to the device and the
        dtype of the parameters it replaces (beside float8 or integer weights, to the dtype of most
        of the model), and is in the model's training mode.

    Raises:
        TypeError: if an argument is of another type, or make_memory returns no module.
        ValueError: if a layer does not exist or is named twice, if there is no such list of
            layers, or more than one, if the layer does not use its FFN as y = f(x), or a memory has
            other widths than what it replaces. The model is as it was then.
    """
    found, numbers, places = _places(model, layers, ffn)
    memories = [make_module(make_memory) for _ in places]
    for number, memory in zip(numbers, memories, strict=True):
        if isinstance(memory, _KeyValueMemory):
            _check_fits(found[number - 1], ffn, memory)
            _check_has_data(model, memory)
    for place, memory in zip(places, memories, strict=True):
        replaced = model.get_submodule(place)
        example = next(replaced.parameters(), None)
        if example is not None:
            memory.to(device=example.device, dtype=memory_dtype(model, replaced))
        memory.train(replaced.training)
        put_memory(model, place, memory)
    return memories


def check_no_memory(model: nn.Module, layers: Sequence[int], ffn: str) -> None:
    """None of these layers, the arguments of `replace_ffn`, has a memory for its FFN."""
    _, numbers, places = _places(model, layers, ffn)
    for number, place in zip(numbers, places, strict=True):
        if isinstance(model.get_submodule(place), _KeyValueMemory):
            raise ValueError(f"layers names layer {number}, but that layer has a memory already")


def _places(
    model: nn.Module, layers: Sequence[int], ffn: str
) -> tuple[nn.ModuleList, list[int], list[str]]:
    """The model's list of layers, the numbers of those named, and the names of their FFNs."""
    check_module("model", model)
    if not isinstance(ffn, str):
        raise TypeError(f"ffn must be a name, not {ffn!r}")
    if not ffn:
        raise ValueError("ffn is '', but must name a module within a layer, such as 'mlp'")
    path, found = _find_layers(model, ffn)
    numbers = check_layers("layers", layers, len(found))
    places = []
    for number in numbers:
        name = _ffn_name(found[number - 1], ffn)
        if name is None:
            raise ValueError(f"layers names layer {number}, but that layer has no module {ffn!r}")
        if not isinstance(found[number - 1], _TORCH_LAYERS):
            check_called_as_a_map(found[number - 1], name)
        places.append(".".join(filter(None, (path, str(number - 1), name))))
    return found, numbers, places


def _check_has_data(model: nn.Module, memory: nn.Module) -> None:
    """The memory holds data, if the model does."""
    if any(p.is_meta for p in memory.parameters()) and not all(
        p.is_meta for p in model.parameters()
    ):
        raise ValueError("device is 'meta', but must be one that holds data, as the model does")


def _check_fits(layer: nn.Module, ffn: str, memory: _KeyValueMemory) -> None:
    """The memory has the widths of the FFN it is to replace."""
    if not isinstance(layer, _TORCH_LAYERS):
        check_widths(layer, ffn, memory.dim, memory.out_dim)
        return
    first, last = layer.linear1, layer.linear2
    if isinstance(first, nn.Linear) and isinstance(last, nn.Linear):
        widths = first.in_features, last.out_features
        if (memory.dim, memory.out_dim) != widths:
            raise ValueError(
                f"the memory maps width {memory.dim} to {memory.out_dim}, but the feed-forward "
                f"block that it is to replace maps {widths[0]} to {widths[1]}"
            )


def put_memory(model: nn.Module, place: str, memory: nn.Module) -> None:
    """Set `memory` at the dotted name `place`.

    In one of torch's layers, whose feed-forward block is no module of its own, that is `linear1`;
    the rest of the block then hands on what the memory returns.
    """
    parent_name, _, name = place.rpartition(".")
    parent = model.get_submodule(parent_name)
    setattr(parent, name, memory)
    if isinstance(memory, _KeyValueMemory):
        hand_on_padding(model, place, memory)
    for absorbed in absorbed_modules(model, place):
        setattr(parent, absorbed.rpartition(".")[2], nn.Identity())
    if isinstance(parent, _TORCH_LAYERS):
        parent.activation = _hand_on
        # Torch's fused inference path would go round the memory.
        parent.activation_relu_or_gelu = 0  # pyright: ignore[reportArgumentType]
        for module in model.modules():
            if isinstance(module, nn.TransformerEncoder) and parent in set(module.layers):
                module.use_nested_tensor = False


def absorbed_modules(model: nn.Module, place: str) -> list[str]:
    """Dotted names of the modules that a memory at `place` puts out of use beside it."""
    parent_name, _, name = place.rpartition(".")
    if isinstance(model.get_submodule(parent_name), _TORCH_LAYERS) and name == "linear1":
        return [".".join(filter(None, (parent_name, other))) for other in ("dropout", "linear2")]
    return []


_TORCH_LAYERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


def _hand_on(x: Tensor) -> Tensor:
    return x


def _ffn_name(layer: nn.Module, ffn: str) -> str | None:
    """The name of a layer's FFN: `ffn` if it has that, `linear1` in torch's own layers."""
    if isinstance(layer, _TORCH_LAYERS):
        return "linear1"
    try:
        layer.get_submodule(ffn)
    except AttributeError:
        return None
    return ffn


def _find_layers(model: nn.Module, ffn: str) -> tuple[str, nn.ModuleList]:
    lists = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and any(_ffn_name(layer, ffn) is not None for layer in module)
    }
    if not lists:
        layers = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m)]
        told = f" {candidates(layers[0][0])}" if layers else ""
        raise ValueError(
            f"ffn is {ffn!r}, but model has no list of layers with a module of that name.{told}"
        )
    if len(lists) > 1:
        raise ValueError(
            f"ffn is {ffn!r}, but model has several lists of layers with such a module: "
            f"{', '.join(lists)}; give one part of the model (`part` of add_memories)"
        )
    return next(iter(lists.items()))
