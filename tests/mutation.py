"""Planting bugs: a copy of the kernels with one line of one file changed."""

import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType

from pkm_triton import kernels

FOLDER = Path(kernels.__file__).parent


def plant(folder: Path, file: str, right: str, wrong: str) -> ModuleType:
    """A copy of the kernels, made in `folder`, in which `wrong` stands for `right`."""
    copy = folder / "mutant"
    shutil.copytree(FOLDER, copy)
    source = (copy / file).read_text()
    assert right in source, "the mutation no longer applies"
    (copy / file).write_text(source.replace(right, wrong))
    name = f"mutant_{abs(hash((file, right, wrong)))}"
    spec = importlib.util.spec_from_file_location(
        name, copy / "__init__.py", submodule_search_locations=[str(copy)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def is_caught(check, mutant: ModuleType) -> bool:
    """Whether the check finds a wrong result or a forbidden access; a mere crash is an error.

    The interpreter wraps what a kernel raises, the guard's findings among it.
    """
    try:
        check(mutant)
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, AssertionError):
                return True
            cause = cause.__cause__ or cause.__context__
        raise
    return False
