"""Targets and precisions: what goes together, what is refused and with which words."""

from __future__ import annotations

import sys

import pytest

from foldgroup.errors import RunnerError, TargetError
from foldgroup.targets import (
    PRECISIONS,
    TARGETS,
    Variant,
    choose,
    find_target,
    make_runner,
    missing,
    parse_precisions,
    parse_variants,
)


def test_every_target_has_a_runner_and_is_known_by_its_name():
    for name, target in TARGETS.items():
        assert find_target(name) is target
        assert set(target.precisions) <= set(PRECISIONS)
        assert make_runner(Variant(target, target.precisions[0]), b"").name


def test_files_of_engines_do_not_collide():
    suffixes = [target.suffix for target in TARGETS.values() if target.takes == "engine"]
    assert len(set(suffixes)) == len(suffixes)


def test_every_target_in_every_precision_it_takes():
    found = choose(["onnxruntime", "openvino"], ["fp32", "bf16"])
    assert [str(v) for v in found] == ["onnxruntime fp32", "openvino fp32", "openvino bf16"]
    found = choose(["openvino:int8", "onnxruntime"], [])
    assert [str(v) for v in found] == ["openvino int8", "onnxruntime fp32"]


def test_the_usual_targets_are_those_that_take_the_precision(monkeypatch):
    monkeypatch.setattr("foldgroup.targets.missing", lambda target: None)
    assert [str(v) for v in choose([], [])] == ["onnxruntime fp32", "tensorrt-rtx fp32"]
    assert [str(v) for v in choose([], ["bf16"])] == ["tensorrt-rtx bf16"]
    assert [str(v) for v in choose([], ["int8"], engines=False)] == ["onnxruntime int8"]
    monkeypatch.setattr("foldgroup.targets.missing", lambda target: "not here")
    assert [str(v) for v in choose([], [])] == ["onnxruntime fp32"]
    with pytest.raises(TargetError, match="onnxruntime does not run bf16"):
        choose([], ["bf16"])


@pytest.mark.parametrize(
    "targets, precisions, message",
    [
        (["onnxruntime"], ["bf16"], "onnxruntime does not run bf16: give it fp32 or fp16 or int8"),
        (["onnxruntime", "aotinductor"], ["bf16"], "onnxruntime does not run bf16"),
        (["aotinductor:int8"], [], "aotinductor does not run int8: give it fp32 or bf16"),
        (["openvino:fp8"], [], "no precision 'fp8'"),
        (["aotinductor"], ["fp32", "int8"], "aotinductor cannot run int8: add a target that can, such as onnxruntime"),
    ],
)
def test_a_target_or_precision_left_without_a_partner_is_refused(targets, precisions, message):
    with pytest.raises(TargetError, match=message):
        choose(targets, precisions)


def test_names_are_known_or_refused_with_those_there_are():
    with pytest.raises(TargetError, match=r"no target 'tensorflow': choose from onnxruntime, .*openvino"):
        find_target("tensorflow")
    with pytest.raises(TargetError, match="no precision 'fp8': choose from fp32, fp16, bf16, int8"):
        parse_precisions(["fp32", "fp8"])
    with pytest.raises(TargetError, match="no precision was named"):
        parse_precisions([])
    assert parse_precisions(["int8", "fp32", "int8"]) == ("int8", "fp32")


def test_variants_of_a_bundle_are_asked_for_by_target_or_by_both():
    known = choose(["onnxruntime", "tensorrt-rtx"], ["fp32", "int8"])
    assert [str(v) for v in parse_variants(["onnxruntime"], known)] == ["onnxruntime fp32", "onnxruntime int8"]
    assert [str(v) for v in parse_variants(["onnxruntime:int8"], known)] == ["onnxruntime int8"]
    assert [str(v) for v in parse_variants(["openvino"], known)] == ["openvino fp32", "openvino int8"]
    assert [str(v) for v in parse_variants(["openvino:int8", "openvino"], known)] == ["openvino int8", "openvino fp32"]
    for wrong in ("openvino:fp8", "nowhere", "aotinductor:int8"):
        with pytest.raises(TargetError):
            parse_variants([wrong], known)


@pytest.mark.parametrize("name", ["openvino", "tensorrt-rtx", "tensorrt", "onnxruntime"])
def test_what_is_missing_is_said_with_what_to_install(monkeypatch, name):
    target = find_target(name)
    monkeypatch.setitem(sys.modules, target.module, None)
    assert f"pip install {target.package}" in str(missing(target))


def test_what_is_there_is_not_missing():
    assert missing(find_target("aotinductor")) is None


def test_an_engine_on_a_gpu_is_not_called_from_two_threads():
    with pytest.raises(RunnerError, match="one call at a time"):
        make_runner(Variant(find_target("tensorrt-rtx"), "fp32"), b"", streams=2)
