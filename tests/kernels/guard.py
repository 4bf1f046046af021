"""A guard for Triton's interpreter: what a GPU would not forgive, and what it would cost.

Under `Guard()` every launch of a kernel checks that each lane of a load, store or atomic lies in a
tensor among the kernel's arguments, and that no two programs write one address without atomics. It
counts the bytes moved, can run the programs of a grid in a shuffled order, and mends what the
interpreter does unlike a GPU: it rounds to bfloat16 instead of truncating.
"""

import random
from collections import defaultdict
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


class OutOfBounds(AssertionError):
    """A lane's address lies in no tensor of the kernel's arguments."""


class WriteRace(AssertionError):
    """Two programs of a launch write the same address."""


class Guard:
    """Guards the launches inside a `with` block.

    Args:
        seed: shuffle the programs of each grid by it; in grid order if None.

    Attributes:
        bytes: of each kernel by name, the bytes loaded, stored and touched by atomics.
        argument_bytes: the same of each kernel and tensor among its arguments, by both names.
        programs: of each kernel by name, how many programs ran.
    """

    def __init__(self, seed: int | None = None) -> None:
        self.seed = seed
        self.bytes: dict[str, int] = defaultdict(int)
        self.argument_bytes: dict[tuple[str, str], int] = defaultdict(int)
        self.programs: dict[str, int] = defaultdict(int)
        self._kernel = ""
        self._regions = np.empty((0, 2), dtype=np.int64)
        self._names: list[str] = []
        self._writers: list[tuple[int, np.ndarray]] = []
        self._program = 0
        self._patched: set[int] = set()
        self._undo: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> "Guard":
        builder = interpreter.InterpreterBuilder
        self._watch(builder, "create_masked_load", 0, 1, writes=False)
        self._watch(builder, "create_masked_store", 0, 2, writes=True)
        self._watch(builder, "create_atomic_rmw", 1, 3, writes=False)
        self._replace(builder, "set_grid_idx", self._set_grid_index)
        self._replace(builder, "create_fp_trunc", self._round)
        self._replace(interpreter.ReduceOps, "generic_reduce", self._reduce)
        self._replace(interpreter.ScanOps, "generic_scan", self._scan)
        self._replace(interpreter.GridExecutor, "__call__", self._launch)
        self._replace(interpreter.InterpretedFunction, "__call__", self._call)
        return self

    def __exit__(self, *_: object) -> None:
        while self._undo:
            setattr(*self._undo.pop())

    def _replace(self, owner: Any, name: str, wrapper: Any) -> None:
        original = getattr(owner, name)
        self._undo.append((owner, name, original))
        setattr(owner, name, lambda this, *args, **kw: wrapper(original, this, *args, **kw))

    def _launch(self, original: Any, executor: Any, *args: Any, **kwargs: Any) -> Any:
        self._kernel = executor.fn.__name__
        named = dict(zip(executor.arg_names, args, strict=False)) | kwargs
        tensors = {name: a for name, a in named.items() if isinstance(a, torch.Tensor)}
        self._names = list(tensors)
        storages = [tensor.untyped_storage() for tensor in tensors.values()]
        self._regions = np.array([(s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages])
        self._writers = []
        self._patched = {id(executor.fn.__globals__)}
        self._order: list[int] | None = None
        result = original(executor, *args, **kwargs)
        self._check_races()
        return result

    def _set_grid_index(self, original: Any, builder: Any, x: int, y: int, z: int) -> Any:
        across, down, deep = builder.grid_dim
        index = (x * down + y) * deep + z
        if self._order is None:
            self._order = list(range(across * down * deep))
            if self.seed is not None:
                random.Random(self.seed).shuffle(self._order)
        self._program = self._order[index]
        self.programs[self._kernel] += 1
        rest, z = divmod(self._program, deep)
        return original(builder, *divmod(rest, down), z)

    def _watch(self, builder: Any, name: str, pointer: int, mask: int, writes: bool) -> None:
        def watched(original: Any, this: Any, *args: Any, **kwargs: Any) -> Any:
            kind = getattr(args[pointer].dtype, "scalar", args[pointer].dtype)
            size = max(1, kind.element_ty.primitive_bitwidth // 8)
            address = args[pointer].data
            if args[mask] is not None:
                address = address[np.broadcast_to(args[mask].data.astype(bool), address.shape)]
            self._check(np.ravel(address).astype(np.int64), size, name, writes)
            return original(this, *args, **kwargs)

        self._replace(builder, name, watched)

    def _check(self, address: np.ndarray, size: int, name: str, writes: bool) -> None:
        self.bytes[self._kernel] += address.size * size
        low, high = self._regions[:, :1], self._regions[:, 1:]
        inside = (address >= low) & (address + size <= high)
        for name_of, count in zip(self._names, inside.sum(1), strict=True):
            self.argument_bytes[self._kernel, name_of] += int(count) * size
        outside = ~inside.any(0)
        if outside.any():
            raise OutOfBounds(
                f"{self._kernel}, program {self._program}: {name} of {outside.sum()} lanes "
                "outside all tensors"
            )
        if writes:
            self._writers.append((self._program, np.unique(address)))

    def _check_races(self) -> None:
        by_program = defaultdict(list)
        for program, address in self._writers:
            by_program[program].append(address)
        written = [np.unique(np.concatenate(parts)) for parts in by_program.values()]
        if written:
            address, times = np.unique(np.concatenate(written), return_counts=True)
            if (times > 1).any():
                raise WriteRace(f"{self._kernel}: {(times > 1).sum()} addresses, two programs each")

    @staticmethod
    def _reduce(original: Any, this: Any, parts: Any) -> Any:
        # The step of `tl.topk`, which the interpreter would take element by element.
        if this.combine_fn is not tl.standard._xor_combine or this.axis is None:
            return original(this, parts)
        data = parts[0].handle.data
        data = np.bitwise_xor.reduce(data, axis=this.axis, keepdims=bool(this.keep_dims))
        return [this.to_tensor(data, parts[0].dtype)]

    @staticmethod
    def _scan(_: Any, this: Any, parts: Any) -> Any:
        # All rows at once, where the interpreter would go element by element.
        data = [np.moveaxis(part.handle.data, this.axis, 0) for part in parts]
        results = [np.array(each) for each in data]
        for i in range(1, data[0].shape[0]):
            sides = [*(each[i - 1] for each in results), *(each[i] for each in data)]
            pairs = zip(sides, [*parts, *parts], strict=True)
            joined = this.combine_fn.fn(*(this.to_tensor(side, p.dtype) for side, p in pairs))
            for result, value in zip(results, joined, strict=True):
                result[i] = value.handle.data
        backward = [np.ascontiguousarray(np.moveaxis(each, 0, this.axis)) for each in results]
        return [
            this.to_tensor(each, part.dtype) for each, part in zip(backward, parts, strict=True)
        ]

    @staticmethod
    def _round(original: Any, builder: Any, source: Any, target: Any) -> Any:
        if getattr(target, "scalar", target) != tl.bfloat16 or source.data.dtype != np.float32:
            return original(builder, source, target)
        rounded = torch.from_numpy(np.ascontiguousarray(source.data)).to(torch.bfloat16)
        bits = rounded.view(torch.uint16).numpy().reshape(source.data.shape)
        return interpreter.TensorHandle(bits, tl.bfloat16)

    def _call(self, _: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        # The interpreter patches triton.language at every call of a device function; once for
        # each module that a launch calls into is enough, and three times as fast.
        module = id(function.fn.__globals__)
        if module not in self._patched:
            self._patched.add(module)
            interpreter._patch_lang(function.fn)
        return function.rewrite()(*args, **kwargs)
