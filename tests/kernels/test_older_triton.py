"""What the compilers before the newest do not take, and its interpreter does."""

import ast
from pathlib import Path

import pytest

from pkm_triton import kernels

FILES = sorted(Path(kernels.__file__).parent.rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_no_chained_comparison(file):
    """Triton before 3.9 compiles no `a <= b < c`."""
    functions = [
        node
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef)
        and any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
    ]
    chained = [
        node.lineno
        for function in functions
        for node in ast.walk(function)
        if isinstance(node, ast.Compare) and len(node.ops) > 1
    ]
    assert not chained, f"{file.name}, lines {chained}"
