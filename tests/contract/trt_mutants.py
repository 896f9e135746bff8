"""Misspell, one after another, every name that a module uses of TensorRT's interface."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from trt_doubles import signatures


def interface_names(real: ModuleType) -> tuple[set[str], dict[str, set[str]]]:
    """All attributes of a module, its classes and enums; and the keywords of every method, by the method's name."""
    names: set[str] = set()
    keywords: dict[str, set[str]] = {}
    for name, thing in vars(real).items():
        names.add(name)
        for attribute in dir(thing) if inspect.isclass(thing) else ():
            names.add(attribute)
            method = getattr(thing, attribute, None)
            if callable(method) and not inspect.isclass(method) and not attribute.startswith("_"):
                for signature in signatures(method.__doc__ or ""):
                    keywords.setdefault(attribute, set()).update(p.name for p in signature.parameters)
    return {name for name in names if not name.startswith("_")}, keywords


class Mutant:
    """One place in a syntax tree that holds a name of the interface."""

    def __init__(self, node: ast.expr | ast.keyword | ast.FunctionDef, field: str) -> None:
        self.node, self.field = node, field
        self.name: str = getattr(node, field)

    def __str__(self) -> str:
        return f"line {self.node.lineno}, column {self.node.end_col_offset}: {self.name}"

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Misspell the name in the tree for a while."""
        setattr(self.node, self.field, f"{self.name}_misspelt")
        try:
            yield
        finally:
            setattr(self.node, self.field, self.name)


def mutants(tree: ast.Module, real: ModuleType) -> Iterator[Mutant]:
    """Every use of a name of the interface: attributes, keywords of calls, methods that override."""
    names, keywords = interface_names(real)
    never_run = set(_inside_annotations(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in names and node not in never_run:
            yield Mutant(node, "attr")
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            for keyword in node.keywords:
                if keyword.arg in keywords.get(node.func.attr, ()):
                    yield Mutant(keyword, "arg")
        elif isinstance(node, ast.ClassDef) and any(ast.unparse(base).startswith("trt.") for base in node.bases):
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and method.name in names:
                    yield Mutant(method, "name")


def _inside_annotations(tree: ast.Module) -> Iterator[ast.AST]:
    for node in ast.walk(tree):
        for annotation in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            if annotation is not None:
                yield from ast.walk(annotation)
