"""The GPU's packing curves, run on this processor: what a GPU session will run must not fail for lack of trying."""

from __future__ import annotations

import json
import sys

import pytest

from bench import gpu_packing, targets
from foldgroup.measure import Measurement


@pytest.fixture
def small(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_packing, "LAYERS", ((16, 8, 1), (16, 8, 2)))
    monkeypatch.setattr(gpu_packing, "LAUNCHES", 1)
    arguments = ["--device", "cpu", "--dtype", "float32", "--batch", "1", "--batch", "2", "--compiler", "cudnn"]
    arguments += ["--layers", "2", "--rounds", "2", "--square", "32", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["gpu_packing", *arguments])
    return tmp_path / "gpu_packing.json"


def test_it_measures_every_group_count_of_every_setting_and_draws_them(small):
    gpu_packing.main()
    document = json.loads(small.read_text())
    assert len(document["curves"]) == 2 * 2 * 2  # layers, batches, layouts
    for entry in document["curves"]:
        assert [c["runs"] for c in entry["candidates"]] == [16, 8, 4, 2, 1]
        assert all(0 < c["low"] <= c["ns"] <= c["high"] for c in entry["candidates"])
    assert document["limits"]["bytes_per_ns"] > 0 and document["limits"]["macs_per_ns"] > 0
    assert small.with_suffix(".svg").read_text().count("limit") >= 1


def test_a_second_run_measures_nothing_that_is_known(small, monkeypatch):
    gpu_packing.main()

    def measured(*_):
        raise AssertionError("it was measured again")

    monkeypatch.setattr(gpu_packing, "curve", measured)
    gpu_packing.main()


def test_it_stops_when_its_time_is_over_and_goes_on_from_there(small, monkeypatch):
    clock = [0.0]

    def curve(*_):
        clock[0] += 1
        return [{"runs": 1, "ns": 1.0, "low": 1.0, "high": 1.0}]

    monkeypatch.setattr(gpu_packing, "curve", curve)
    monkeypatch.setattr(gpu_packing, "limits", lambda *_: {"bytes_per_ns": 1.0, "macs_per_ns": 1.0})
    monkeypatch.setattr(gpu_packing, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--seconds", "2.5"])
    for done in (3, 6):
        with pytest.raises(SystemExit, match="run it again"):
            gpu_packing.main()
        assert len(json.loads(small.read_text())["curves"]) == done
    gpu_packing.main()
    assert len(json.loads(small.read_text())["curves"]) == 8


def test_what_the_library_refuses_is_left_out_with_its_reason(small, monkeypatch):
    def sampler(call, device, launches):
        sampler.calls += 1
        if sampler.calls % 5 == 0:
            raise RuntimeError("no engine\nout of memory")
        return lambda: 1.0

    sampler.calls = 0
    monkeypatch.setattr(gpu_packing, "limits", lambda *_: {"bytes_per_ns": 1.0, "macs_per_ns": 1.0})
    monkeypatch.setattr(gpu_packing, "sampler", sampler)
    gpu_packing.main()
    refused = [c for entry in json.loads(small.read_text())["curves"] for c in entry["candidates"] if "refused" in c]
    assert refused and all(c["refused"] == "out of memory" for c in refused)


def test_a_setting_of_which_everything_is_refused_is_kept_with_its_reasons(small, monkeypatch):
    def refuse(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(gpu_packing, "sampler", refuse)
    monkeypatch.setattr(gpu_packing, "limits", lambda *_: {"bytes_per_ns": 1.0, "macs_per_ns": 1.0})
    gpu_packing.main()
    for entry in json.loads(small.read_text())["curves"]:
        assert [c["refused"] for c in entry["candidates"]] == ["out of memory"] * 5
    assert small.with_suffix(".svg").is_file()


def test_the_limit_is_that_of_bytes_or_of_products():
    entry = {"layer": [16, 8, 1], "batch": 2}
    depthwise, dense = 2 * 16 * 9 * 64, 2 * 16 * 16 * 9 * 64
    assert gpu_packing.bound_ns(entry, 1, {"bytes_per_ns": 1e9, "macs_per_ns": 1.0}, 2) == dense
    assert gpu_packing.bound_ns(entry, 16, {"bytes_per_ns": 1e9, "macs_per_ns": 2.0}, 2) == depthwise / 2
    moved = 2 * (2 * 2 * 16 * 64 + 16 * 9)
    assert gpu_packing.bound_ns(entry, 16, {"bytes_per_ns": 1.0, "macs_per_ns": 1e9}, 2) == moved


def test_samples_are_taken_in_turn():
    calls = []
    samplers = {name: lambda name=name: calls.append(name) or 1.0 for name in "abc"}
    measured = gpu_packing.measure(samplers, rounds=4)
    assert isinstance(measured, Measurement)
    assert [sorted(calls[i : i + 3]) for i in range(0, 15, 3)] == [["a", "b", "c"]] * 5


@pytest.mark.parametrize(
    ("message", "guilty"),
    [
        ("aotinductor-cuda fp16: no GPU", ["aotinductor-cuda:fp16"]),
        ("tensorrt-rtx needs tensorrt_rtx", ["tensorrt-rtx:fp32", "tensorrt-rtx:int8"]),
        ("model.pt: no such file", []),
    ],
)
def test_a_target_that_is_refused_is_left_out_with_its_reason(message, guilty):
    asked = ["aotinductor-cuda:fp32", "aotinductor-cuda:fp16", "tensorrt-rtx:fp32", "tensorrt-rtx:int8"]
    assert targets.refused_by(message, asked) == guilty
