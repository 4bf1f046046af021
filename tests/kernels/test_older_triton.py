"""What the compilers before the newest do not take, and its interpreter does."""

import ast
from pathlib import Path

import pytest

from pkm_triton import kernels

FILES = sorted(Path(kernels.__file__).parent.rglob("*.py"))


each_file = pytest.mark.parametrize(
    "file", FILES, ids=lambda file: f"{file.parent.name}/{file.stem}"
)


def compiled_functions(file):
    return [
        node
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef)
        and any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
    ]


@each_file
def test_no_chained_comparison(file):
    """Triton before 3.9 compiles no `a <= b < c`."""
    chained = [
        node.lineno
        for function in compiled_functions(file)
        for node in ast.walk(function)
        if isinstance(node, ast.Compare) and len(node.ops) > 1
    ]
    assert not chained, f"{file.name}, lines {chained}"


@each_file
def test_no_field_of_a_constant_in_a_shape(file):
    """Triton 3.6 takes it for a plain integer there, unless it was assigned to a name before."""
    fields = [
        f"line {field.lineno}: {ast.unparse(field)}"
        for function in compiled_functions(file)
        for node in ast.walk(function)
        if isinstance(node, ast.List)
        for field in node.elts
        if isinstance(field, ast.Attribute)
    ]
    assert not fields
