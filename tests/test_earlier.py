"""A benchmark against an earlier one: a ratio only where both were measured the same way."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from foldgroup.benchmarking import benchmark
from foldgroup.earlier import compare, read_report
from foldgroup.errors import ComparisonError


@pytest.fixture(scope="module")
def report(tiny_bundle: Path) -> dict[str, Any]:
    return json.loads(json.dumps(benchmark(tiny_bundle, max_seconds=0).as_dict()))


def test_every_shared_subject_is_compared(report: dict[str, Any]) -> None:
    before = copy.deepcopy(report)
    for subject in before["subjects"]:
        subject["median_ms"] *= 3
    before["subjects"].append({**before["subjects"][0], "name": "another"})
    changes = compare(report, before)
    assert [c.subject for c in changes] == [s["name"] for s in report["subjects"]]
    assert all(c.speed_up == pytest.approx(3) for c in changes)


@pytest.mark.parametrize(
    "where, value, words",
    [
        (("checkpoint", "sha256"), "0", "checkpoint's sha256"),
        (("machine", "gpu"), "H200", "machine's gpu H200 then, None now"),
        (("threads",), 4, "threads 4 then, 1 now"),
        (("batch",), 8, "batch 8 then, 1 now"),
        (("streams",), 2, "streams 2 then, 1 now"),
        (("input_shape",), [1, 3, 32, 32], "input_shape"),
        (("machine", "processor"), "another", "machine's processor another then"),
        (("subjects", 0, "runtime", "version"), "0.1", "folded form: version 0.1 then"),
        (("subjects", 0, "runtime", "provider"), "CUDAExecutionProvider", "folded form: provider CUDA"),
        (("subjects", 1, "runtime", "precision"), "int8", "training form: precision int8 then, fp32 now"),
    ],
)
def test_no_ratio_between_runs_with_different_settings(
    report: dict[str, Any], where: tuple[Any, ...], value: Any, words: str
) -> None:
    before = copy.deepcopy(report)
    part = before
    for key in where[:-1]:
        part = part[key]
    part[where[-1]] = value
    with pytest.raises(ComparisonError, match=f"no ratio between runs with different settings: .*{words}"):
        compare(report, before)


def test_nothing_in_common_is_said(report: dict[str, Any]) -> None:
    with pytest.raises(ComparisonError, match="no subject in common"):
        compare(report, {**report, "subjects": []})


@pytest.mark.parametrize("content, words", [("{", "not JSON"), ("[]", "not a benchmark"), ('{"threads": 1}', "--json")])
def test_other_files_are_refused(tmp_path: Path, content: str, words: str) -> None:
    file = tmp_path / "before.json"
    file.write_text(content)
    with pytest.raises(ComparisonError, match=words):
        read_report(file)
    with pytest.raises(ComparisonError, match="cannot be read"):
        read_report(tmp_path / "none.json")
