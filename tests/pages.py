"""The pages of bundles for tests: of the tiny one's documents and of richer ones, and read as trees."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from foldgroup.report.page import report_page

VOID = {"meta", "wbr"}
Documents = dict[str, Any]


class Element:
    """A node of a parsed page."""

    def __init__(self, tag: str, attributes: Mapping[str, str | None]) -> None:
        self.tag, self.attributes = tag, attributes
        self.inside: list[Element | str] = []

    def __iter__(self) -> Iterator[Element]:
        """Itself and all below, in their order."""
        yield self
        for child in self.inside:
            if isinstance(child, Element):
                yield from child

    def all(self, tag: str, **attributes: str) -> list[Element]:
        return [e for e in self if e.tag == tag and all(e.attributes.get(k) == v for k, v in attributes.items())]

    def only(self, tag: str, **attributes: str) -> Element:
        (found,) = self.all(tag, **attributes)
        return found

    @property
    def text(self) -> str:
        return "".join(child if isinstance(child, str) else child.text for child in self.inside)


class Parsed(HTMLParser):
    """A page as a tree; refuses tags that do not match and attributes that are given twice."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.root = Element("", {})
        self._open = [self.root]
        self.feed(page)
        self.close()
        assert self._open == [self.root], f"never closed: {[element.tag for element in self._open]}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            element = self._open[-1].inside[-1]
            assert isinstance(element, Element)
            self._open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"an attribute of {tag} is given twice"
        self._open[-1].inside.append(Element(tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        self._open[-1].inside.append(data)

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data}")


def parsed(page: str) -> Element:
    return Parsed(page).root


def documents_of(bundle: Path) -> Documents:
    names = ("manifest", "passes", "verification", "engines", "preprocessing")
    return {name: json.loads((bundle / f"{name}.json").read_text(encoding="utf-8")) for name in names}


def page_of(documents: Documents, name: str = "tiny.foldgroup") -> str:
    return report_page(name, **documents)


def enrich(documents: Documents) -> Documents:
    """Put in all that a bundle may have: layers packed, a tuner's times, engines, kept shuffles, targets not run."""
    manifest, verification = documents["manifest"], documents["verification"]
    manifest["layers"][1] |= {"executed_groups": 2, "executed_macs": 73_728}
    found = [{"count": 2, "in_width": 8, "out_width": 4}, {"count": 1, "in_width": 3, "out_width": 5}]
    manifest["found"] = [{"name": "layer3.0.conv2", "groups": found}]
    channels = [{"reads": "0-6 11-18 7", "writes": "4-7 0-3"}, {"reads": "8-10", "writes": "12 8-11"}]
    groups = [part | which for part, which in zip(found, channels, strict=True)]
    layer = {"name": "layer3.0.conv2", "in_channels": 20, "out_channels": 14, "groups": groups}
    next(r for r in documents["passes"]["passes"] if r["name"] == "find_groups")["details"] = {"layers": [layer]}
    names = ("openvino int8", "tensorrt-rtx fp16", "aotinductor fp32", "onnxruntime-cuda fp16")
    manifest["targets"] += [dict(zip(("target", "precision"), name.split(), strict=True)) for name in names]
    manifest["models"] |= {key: {"file": f"model.{key}.onnx"} for key in ("int8", "fp16")}
    plan = {"target": "tensorrt-rtx", "precision": "fp16", "file": "model.rtx.plan"}
    package = {"target": "aotinductor", "precision": "fp32", "file": "model.pt2"}
    documents["engines"] |= {"engines": [plan, package], "files": {"triton/config.pbtxt": {}}}
    verification["not_run"] = {"tensorrt-rtx fp16": "there is no GPU"}
    failed = {**verification["tiers"]["onnxruntime fp32"], "passed": False, "top1_agreement": None}
    verification["tiers"]["openvino int8"] = failed
    candidates = [{"runs": runs, "parts": 1, "ns": 9000 + 100 * runs} for runs in (4, 2, 1)]
    layer = {"name": "layer2.0.conv2", "groups": 4, "runs": 2, "parts": 1, "candidates": candidates}
    whole = {"ratio": {"value": 1.25, "low": 1.2, "high": 1.3}, "challenger": "measured", "reason": "it is faster"}
    verification["tuning"]["onnxruntime fp32"] = {
        "source": "measured",
        "threads": None,
        "batch": 1,
        "layers": [{**layer, "shape": "16→16 3×3 at 8×8, 4 groups"}],
        "whole": whole,
    }
    kept = {"node": "conv_in", "channels": 8, "fate": "kept", "reason": "channels before it are fixed by view"}
    documents["passes"]["passes"][-1]["shuffles"].append({**kept, "put_in_by": "network"})
    return documents


def widen(documents: Documents) -> Documents:
    """Make of it a network of 60 layers with long names, many of each kind of thing."""
    manifest, verification = documents["manifest"], documents["verification"]
    names = [f"features.denseblock{i // 20 + 1}.denselayer{i % 20 + 1}.conv2" for i in range(59)] + ["x" * 60]
    learned = {"gate_bits": [1, 0, 1, 0, 1], "groups": 4, "executed_groups": 2}
    costs = {"macs": 123_456_789, "executed_macs": 234_567_890}
    sizes = [{"in_channels": n, "out_channels": n} for n in (32, 96, 160, 224, 288)]
    manifest["layers"] = [{"name": name, **sizes[i % 5], **learned, **costs} for i, name in enumerate(names)]
    manifest["checkpoint"]["arch"] = "densenet_of_somebody_else_with_a_name_that_is_longer_than_a_line_on_a_phone"
    tier = verification["tiers"]["onnxruntime fp32"]
    for name in ("onnxruntime int8", "openvino bf16", "openvino int8", "rounded bf16"):
        verification["tiers"][name] = tier
    layers = verification["profile"]["layers"]
    verification["profile"]["layers"] = [{**layers[i % 12], "name": name} for i, name in enumerate(names)]
    return documents
