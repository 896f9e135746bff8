"""Our TensorRT code keeps to the interface of every TensorRT there is, and these tests would know if it did not.

TensorRT itself needs a GPU; its Python bindings do not. ``trt_bindings`` fetches them, ``trt_doubles`` makes doubles
that know the real interface, ``trt_building`` and ``trt_running`` run our code on them, ``trt_mutants`` misspells it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from trt_bindings import installed_bindings
from trt_doubles import Library, signatures

from foldgroup.emit import tensorrt

TENSORRT = {
    "the oldest 10": "tensorrt_cu12_bindings==10.12.*",
    "the newest 10": "tensorrt_cu13_bindings>=10.16,<11",
    "the newest 11": "tensorrt_cu13_bindings>=11,<12",
}
"""The versions of TensorRT that are tried, as requirements."""

RTX = "TensorRT-RTX"

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def reports(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, Mapping[str, Any]]:
    """What ``trt_check.py`` found out, by version, or why the version could not be had."""
    kept = getattr(request.config, "cache", None)  # there is none under -p no:cacheprovider
    cache = (kept.mkdir if kept is not None else tmp_path_factory.mktemp)("tensorrt-bindings")
    missing: dict[str, Mapping[str, Any]] = {}
    libraries: dict[str, tuple[str, str, str]] = {}
    for version, requirement in TENSORRT.items():
        try:
            folder = installed_bindings(requirement, cache)
        except pytest.skip.Exception as reason:
            missing[version] = {"missing": str(reason)}
        else:
            libraries[version] = (str(folder), "tensorrt_bindings", "tensorrt")
    if tensorrt.available():
        libraries[RTX] = ("", "tensorrt_rtx", "tensorrt_rtx")
    else:
        missing[RTX] = {"missing": "tensorrt-rtx has no wheel for this platform"}
    if not libraries:
        return missing
    paths = [str(HERE.parent), str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")]
    process = subprocess.run(
        [sys.executable, str(HERE / "trt_check.py"), json.dumps(libraries)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    found: dict[str, Mapping[str, Any]] = json.loads(process.stdout)
    return missing | found


def checked(reports: Mapping[str, Mapping[str, Any]], *versions: str) -> list[Mapping[str, Any]]:
    """The reports on ``versions``; skips the test that asks if one could not be had."""
    for version in versions:
        if "missing" in reports[version]:
            pytest.skip(reports[version]["missing"])
        assert "error" not in reports[version], reports[version]["error"]
    return [reports[version] for version in versions]


@pytest.mark.parametrize("version", [*TENSORRT, RTX])
def test_our_code_keeps_to_the_interface_of(version: str, reports: Mapping[str, Mapping[str, Any]]) -> None:
    checked(reports, version)


def test_the_versions_are_those_we_mean(reports: Mapping[str, Mapping[str, Any]]) -> None:
    oldest, *others = (report["version"] for report in checked(reports, *TENSORRT))
    assert oldest.startswith("10.12.")
    assert [version.split(".")[0] for version in others] == ["10", "11"]


def test_every_misspelling_of_a_name_is_caught(reports: Mapping[str, Mapping[str, Any]]) -> None:
    """By TensorRT or by TensorRT-RTX: a few lines are for one of them only."""
    found = checked(reports, *TENSORRT, RTX)
    caught = {mutant for report in found for mutant in report["caught"]}
    survived = {mutant for report in found for mutant in report["survived"]}
    assert survived - caught == set()
    assert len(caught) > 80


def test_what_one_version_of_tensorrt_catches_all_do(reports: Mapping[str, Mapping[str, Any]]) -> None:
    oldest, *others = (set(report["survived"]) for report in checked(reports, *TENSORRT))
    assert all(other == oldest for other in others)


class TestDoubles:
    """A double refuses what the real object would refuse."""

    @pytest.fixture
    def library(self) -> Library:
        return Library(pytest.importorskip("tensorrt_rtx"), {})

    def test_unknown_attributes_cannot_be_read_or_set(self, library: Library) -> None:
        config = library.make("IBuilderConfig")
        with pytest.raises(AttributeError, match="max_workspace_size"):
            _ = config.max_workspace_size
        with pytest.raises(AttributeError, match="max_workspace_size"):
            config.max_workspace_size = 1
        with pytest.raises(AttributeError, match="num_optimization_profiles cannot be set"):
            config.num_optimization_profiles = 1
        with pytest.raises(AttributeError, match="IInt8Calibrator"):
            _ = library.IInt8Calibrator

    @pytest.mark.parametrize(
        ("args", "keywords"),
        [
            ((), {}),
            ((1,), {}),
            (("input", (1,), (1,)), {}),
            (("input", (1,), (1,), (1,), (1,)), {}),
            (("input", (1,), (1,)), {"maximum": (1,)}),
            (("input", 1, 1, 1), {}),
            (("input", (1,), (1,), (1,)), {"max": (1,)}),
        ],
    )
    def test_calls_that_fit_no_signature_are_refused(
        self, library: Library, args: tuple[Any, ...], keywords: dict[str, Any]
    ) -> None:
        profile = library.make("IOptimizationProfile")
        profile.set_shape("input", (1,), (1,), max=(1,))
        with pytest.raises(TypeError, match=r"set_shape does not take"):
            profile.set_shape(*args, **keywords)

    def test_values_of_the_wrong_type_are_refused(self, library: Library) -> None:
        config = library.make("IBuilderConfig")
        config.profiling_verbosity = library.ProfilingVerbosity.DETAILED
        with pytest.raises(TypeError, match="no ProfilingVerbosity"):
            config.profiling_verbosity = library.MemoryPoolType.WORKSPACE
        with pytest.raises(TypeError, match="no IProgressMonitor"):
            config.progress_monitor = object()

    def test_signatures_are_read_with_overloads_and_defaults(self, library: Library) -> None:
        one, other = signatures(library._real.ICudaEngine.create_execution_context.__doc__)
        assert [(p.name, p.kind, p.optional) for p in (*one.parameters, *other.parameters)] == [
            ("strategy", "ExecutionContextAllocationStrategy", True),
            ("runtime_config", "IRuntimeConfig", True),
        ]
        assert one.returns == other.returns == "IExecutionContext"
