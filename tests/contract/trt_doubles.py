"""Doubles of TensorRT's objects that know the real interface, and nothing besides.

A double of class C has exactly the attributes of the binding class C. Calls are checked against the signatures that
pybind11 writes into docstrings: number of arguments, keywords, types. What a call returns is a double of the class
named after ``->``. Enums are the real ones, and so are the classes that users derive from.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

DERIVED_FROM = ("ILogger", "IProgressMonitor", "IProfiler")
"""Classes of which users make subclasses that the library calls back."""

ALIASES = {"IParserError": "ParserError"}
"""Names in docstrings that pybind11 wrote before it knew the Python class."""

SIMPLE: Mapping[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "SupportsInt": (int,),
    "SupportsIndex": (int,),
    "float": (float, int),
    "SupportsFloat": (float, int),
    "bool": (bool,),
    "Buffer": (bytes,),
    "buffer": (bytes,),
    "Dims": (tuple, list),
    "tuple": (tuple,),
    "list": (list,),
    "object": (object,),
}
DEFAULTS: Mapping[str, Any] = {
    "bool": True,
    "int": 0,
    "float": 0.0,
    "str": "",
    "None": None,
    "Dims": (),
    "object": None,
}


@dataclass(frozen=True)
class Parameter:
    name: str
    kind: str
    optional: bool
    takes_none: bool


@dataclass(frozen=True)
class Signature:
    parameters: tuple[Parameter, ...]
    returns: str


def signatures(doc: str) -> tuple[Signature, ...]:
    """All overloads in a docstring of pybind11, without ``self``."""
    lines = re.findall(r"^(?:\d+\. )?(?:\w+)?(\(.*\) -> .*)$", doc, re.MULTILINE)
    return tuple(_signature(line) for line in lines if not line.startswith("(*args"))


def _signature(text: str) -> Signature:
    inside, returns = text[1:].rsplit(") -> ", 1)
    parameters = []
    for part in list(_split(inside))[1:]:
        name, rest = part.split(": ", 1)
        kind, _, default = rest.partition(" = ")
        parameters.append(Parameter(name, _last(kind), bool(default), default == "None"))
    return Signature(tuple(parameters), _last(returns))


def _split(text: str) -> Iterator[str]:
    """The parts between those commas that stand in no brackets."""
    depth, start = 0, 0
    for i, character in enumerate(text):
        depth += (character in "([{<") - (character in ")]}>")
        if character == "," and depth == 0:
            yield text[start:i].strip()
            start = i + 1
    if text[start:].strip():
        yield text[start:].strip()


def _last(kind: str) -> str:
    """``IBuilderConfig`` of ``tensorrt_bindings.tensorrt.IBuilderConfig`` or ``nvinfer1::IBuilderConfig``."""
    name = re.split(r"\.|::", kind.split("[", 1)[0])[-1]
    return ALIASES.get(name, name)


class Library:
    """A double of a TensorRT module.

    ``script`` says what some attributes do: ``{"Builder.create_network": function of the double and the arguments}``
    for a method, a function of the double alone for a property. ``writes`` are the attributes that were set, in order.
    """

    def __init__(self, real: ModuleType, script: Mapping[str, Callable[..., Any]]) -> None:
        self._real = real
        self._script = dict(script)
        self.writes: list[str] = []
        for key in script:  # a script has to keep to the interface too
            name, attribute = key.split(".")
            assert hasattr(getattr(real, name), attribute), f"{real.__name__} has no {key}"

    def __getattr__(self, name: str) -> Any:
        thing = getattr(self._real, name)
        if not inspect.isclass(thing) or hasattr(thing, "__members__") or name in DERIVED_FROM:
            return thing

        def construct(*args: Any, **keywords: Any) -> Any:
            _, values = self._bind(name, signatures(thing.__init__.__doc__), args, keywords)
            double = Double(self, thing, values)
            check = self._script.get(f"{name}.__init__")
            if check is not None:
                check(double, *values)
            return double

        return construct

    def get(self, double: Double, name: str) -> Any:
        cls = double.cls
        attribute = inspect.getattr_static(cls, name)  # raises AttributeError if the real class has none
        script = self._script.get(f"{cls.__name__}.{name}")
        if isinstance(attribute, property):
            if script is not None:
                return script(double)
            if name in double.values:
                return double.values[name]
            (signature,) = signatures(attribute.fget.__doc__)
            return self.make(signature.returns)
        overloads = signatures(getattr(cls, name).__doc__)

        def call(*args: Any, **keywords: Any) -> Any:
            signature, values = self._bind(f"{cls.__name__}.{name}", overloads, args, keywords)
            return self.make(signature.returns) if script is None else script(double, *values)

        return call

    def set(self, double: Double, name: str, value: Any) -> None:
        attribute = inspect.getattr_static(double.cls, name)
        if not isinstance(attribute, property) or attribute.fset is None:
            raise AttributeError(f"{double.cls.__name__}.{name} cannot be set")
        (signature,) = signatures(attribute.fset.__doc__)
        (parameter,) = signature.parameters
        if not self._fits(value, parameter):
            raise TypeError(f"{double.cls.__name__}.{name} is set to {value!r}, which is no {parameter.kind}")
        self.writes.append(name)
        double.values[name] = value

    def make(self, returns: str) -> Any:
        """What a call that is declared to return ``returns`` gives if no script says otherwise."""
        if returns in DEFAULTS:
            return DEFAULTS[returns]
        cls = getattr(self._real, returns)
        return next(iter(cls.__members__.values())) if hasattr(cls, "__members__") else Double(self, cls)

    def _bind(
        self, what: str, overloads: tuple[Signature, ...], args: tuple[Any, ...], keywords: Mapping[str, Any]
    ) -> tuple[Signature, list[Any]]:
        """The overload that takes the arguments, and their values in its order, without those left out at the end."""
        for signature in overloads:
            names = [parameter.name for parameter in signature.parameters]
            given = dict(zip(names, args, strict=False)) | dict(keywords)
            if len(args) + len(keywords) != len(given) or not set(given) <= set(names):
                continue
            if all(self._fits(given[p.name], p) if p.name in given else p.optional for p in signature.parameters):
                return signature, [given[name] for name in names if name in given]
        raise TypeError(f"{what} does not take {args} {dict(keywords)}: it is {overloads}")

    def _fits(self, value: Any, parameter: Parameter) -> bool:
        if value is None and parameter.takes_none:
            return True
        if parameter.kind in SIMPLE:
            return isinstance(value, SIMPLE[parameter.kind])
        cls = getattr(self._real, parameter.kind)
        return value.cls is cls if isinstance(value, Double) else isinstance(value, cls)


class Double:
    """A stand-in for an object of the binding class ``cls``. ``given`` are the arguments it was made with."""

    def __init__(self, library: Library, cls: type, given: list[Any] | None = None) -> None:
        for name, value in (("library", library), ("cls", cls), ("given", given or []), ("values", {})):
            object.__setattr__(self, name, value)

    def __getattr__(self, name: str) -> Any:
        return self.library.get(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self.library.set(self, name, value)

    def __bytes__(self) -> bytes:
        if self.cls.__name__ != "IHostMemory":
            raise TypeError(f"{self.cls.__name__} has no buffer")
        return b"content of host memory"


def call_back(target: Any, name: str, *args: Any) -> Any:
    """Call a method of a user's subclass as the library does: it must be there, under the name of the base class's."""
    (base,) = (cls for cls in type(target).__mro__ if cls.__name__ in DERIVED_FROM)
    own = inspect.getattr_static(type(target), name)
    assert own is not inspect.getattr_static(base, name), f"{type(target).__name__} does not override {name}"
    (signature,) = signatures(getattr(base, name).__doc__)
    assert len(args) == len(signature.parameters)
    return getattr(target, name)(*args)
