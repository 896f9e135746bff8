"""Run the scenario, then every mutant, against each library named, and print what was found as one JSON object.

``python trt_check.py '{"newest": ["FOLDER", "tensorrt_bindings", "tensorrt"], …}'``: where from, what is imported, and
the module that our code is told it is. Each library has a process of its own: two cannot be loaded into one.
"""

from __future__ import annotations

import ast
import importlib
import json
import multiprocessing
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import trt_mutants
from trt_building import Building
from trt_running import Running

MODULES = ("foldgroup.emit.tensorrt", "foldgroup.run.trt")
"""In the order that they import each other."""


def check(folder: str, import_name: str, name: str) -> dict[str, Any]:
    """The library's version, the mutants caught and survived; or the error, if the code itself breaks the contract."""
    sys.path.insert(0, folder)
    warnings.simplefilter("ignore")
    real = importlib.import_module(import_name)
    files = {module: Path(str(importlib.import_module(module).__file__)) for module in MODULES}
    trees = {module: ast.parse(file.read_text(encoding="utf-8"), str(file)) for module, file in files.items()}
    try:
        run_scenario(real, name, trees)
    except Exception:
        return {"error": traceback.format_exc()}
    caught, survived = [], []
    for module, tree in trees.items():
        for mutant in trt_mutants.mutants(tree, real):
            with mutant.applied():
                try:
                    run_scenario(real, name, trees)
                except Exception:  # of any kind
                    found = caught
                else:
                    found = survived
            found.append(f"{files[module].name}, {mutant}")
    return {"version": real.__version__, "caught": caught, "survived": survived}


def run_scenario(real: ModuleType, name: str, trees: dict[str, ast.Module]) -> None:
    """Run the modules of ``trees`` from end to end against the interface of ``real``, taken for the module ``name``.

    Raises:
        Exception: of any kind, if they do not keep to the interface or give a wrong result.
    """
    emit, runner = (_load(module, tree) for module, tree in trees.items())
    with tempfile.TemporaryDirectory() as folder:
        Building(real, name, emit, Path(folder)).check_all()
    Running(real, name, runner).check_all()


def _load(name: str, tree: ast.Module) -> ModuleType:
    """A module made anew from its syntax tree, in place of the one imported."""
    module = ModuleType(name)
    sys.modules[name] = module
    exec(compile(tree, f"<{name}>", "exec"), module.__dict__)
    return module


if __name__ == "__main__":
    libraries = json.loads(sys.argv[1])
    for module in MODULES:  # once for all processes
        importlib.import_module(module)
    with multiprocessing.get_context("fork").Pool(min(len(libraries), 4), maxtasksperchild=1) as pool:
        reports = pool.starmap(check, libraries.values(), chunksize=1)
    print(json.dumps(dict(zip(libraries, reports, strict=True))))
