"""What torch's parametrizations and transformers ask of a module with parameters of its own."""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from torch import Tensor, nn


class _AnyName(nn.ModuleDict):
    """A ModuleDict that takes the names of its own methods, `values` and `keys`, for modules."""

    def add_module(self, name: str, module: nn.Module | None) -> None:
        self._modules[name] = module  # pyright: ignore[reportArgumentType]

    def __getattribute__(self, name: str) -> Any:
        if name in ("values", "keys"):
            # Where a module has that name, `get_submodule` and its like must find the module.
            modules = super().__getattribute__("__dict__").get("_modules", {})
            if name in modules:
                return modules[name]
        return super().__getattribute__(name)


class Pool(list["HostedModule"]):
    """Modules that share tables. A copy of it is empty: the copies of modules join it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Pool, ()


class HostedModule(nn.Module):
    """A module with parameters of its own, whose names may be `values` and `keys`.

    Attributes:
        table_names: those of its parameters that several modules may share.
        pool: the modules that share these, this one among them; empty if none do.
    """

    table_names: ClassVar[tuple[str, ...]]
    pool: Pool | tuple[()] = ()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "parametrizations" and type(value) is nn.ModuleDict:
            # torch.nn.utils.parametrize, spectral norm and PEFT's target_parameters put what they
            # make of a parameter into a ModuleDict, under the parameter's name.
            value = _AnyName(dict(value.items()))
        super().__setattr__(name, value)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if isinstance(self.pool, Pool):
            self.pool.append(self)
        self._adopt()

    @abstractmethod
    def _adopt(self) -> None:
        """Take note that tables may be new."""

    @contextmanager
    def _replacing_for_all(self) -> Iterator[None]:
        """Give new parameters that take the place of tables to all that share those."""
        before = {name: self._parameters.get(name) for name in self.table_names}
        yield
        for name, old in before.items():
            new = self._parameters.get(name)
            if old is None or new is old:
                continue
            for module in self.pool:
                if module._parameters.get(name) is old:
                    module._parameters[name] = new
        self._adopt()

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        """As `nn.Module`, which makes new parameters of those on the meta device."""
        with self._replacing_for_all():
            super()._apply(fn, recurse)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """As `nn.Module`, which makes new parameters with `assign=True`."""
        with self._replacing_for_all():
            super()._load_from_state_dict(*args, **kwargs)

    @abstractmethod
    def _initialise(self, loaded: set[Tensor]) -> None:
        """Initialise all but what was loaded; `nn.init` leaves that alone here."""

    # transformers builds models on the meta device, and marks what a checkpoint held. It goes
    # through the modules then, with `nn.init` guarded so that marked tensors stay, and what has no
    # mark it leaves to `_init_weights` of the model, which does not know this class; afterwards it
    # marks the module.

    @property
    def _is_hf_initialized(self) -> bool:
        return self.__dict__.get("_initialised", False)

    @_is_hf_initialized.setter
    def _is_hf_initialized(self, value: bool) -> None:
        if value and not self._is_hf_initialized:
            tensors = {*self.parameters(), *self.buffers()}
            loaded = {t for t in tensors if getattr(t, "_is_hf_initialized", False)}
            if loaded != tensors:
                self._initialise(loaded)
                self._share_again(loaded)
        self.__dict__["_initialised"] = value

    def _share_again(self, loaded: set[Tensor]) -> None:
        """Loading made a parameter of each name; one that a checkpoint held is kept."""
        pool = [module for module in self.pool if module.pool is self.pool]
        for name in self.table_names:
            tables = [getattr(module, name) for module in pool]
            if pool and getattr(self, name) not in loaded:
                held = (t for t in tables if getattr(t, "_is_hf_initialized", False))
                setattr(self, name, next(held, tables[0]))
