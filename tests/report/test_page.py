"""The page of a bundle stands alone, shows nothing as markup that it was given, and says what the documents say."""

from __future__ import annotations

import copy
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from pages import Documents, Element, documents_of, enrich, page_of, parsed

from foldgroup.grouping import factorize, kronecker_mask
from foldgroup.report import svg
from foldgroup.report.charts import histogram
from foldgroup.report.layout import count

HOSTILE = "<script>alert(1)</script> \"a\" 'b' &amp; </style> <!-- ☃"


@pytest.fixture
def documents(tiny_bundle: Path) -> Documents:
    return documents_of(tiny_bundle)


@pytest.fixture
def rich(documents: Documents) -> Documents:
    return enrich(documents)


@pytest.mark.parametrize("which", ["documents", "rich"])
class TestWellFormed:
    @pytest.fixture
    def page(self, which: str, request: pytest.FixtureRequest) -> str:
        return page_of(request.getfixturevalue(which))

    def test_tags_match_and_ids_are_unique(self, page: str) -> None:
        root = parsed(page)
        ids = Counter(e.attributes["id"] for e in root if "id" in e.attributes)
        assert ids and max(ids.values()) == 1
        for link in (e.attributes["href"] for e in root if "href" in e.attributes):
            assert link is not None and link.startswith("#") and link[1:] in ids

    def test_nothing_is_loaded(self, page: str) -> None:
        root = parsed(page)
        assert not any(e.tag in ("link", "img", "iframe", "object", "embed", "base") for e in root)
        assert not any({"src", "srcset", "style", "xlink:href"} & e.attributes.keys() for e in root)
        assert not re.search(r"@import|url\(|https?:|//\w", page)
        script = root.only("script").text
        assert not re.search(r"fetch|XMLHttp|import|eval|innerHTML", script)

    def test_tables_have_as_many_cells_as_heads(self, page: str) -> None:
        for table in parsed(page).all("table"):
            head = table.only("thead").all("th")
            assert table.only("tbody").all("tr")
            assert all(len(row.all("td")) == len(head) for row in table.only("tbody").all("tr"))

    def test_wide_things_scroll_by_themselves(self, page: str) -> None:
        root = parsed(page)
        boxed = {id(e) for box in root.all("div", **{"class": "scroll"}) for e in box}
        wide = root.all("table") + [e for e in root.all("svg") if float(e.attributes["width"] or 0) > 400]
        assert wide and all(id(e) in boxed for e in wide)

    def test_drawings_have_a_title(self, page: str) -> None:
        for drawing in parsed(page).all("svg"):
            first = drawing.inside[0]
            assert isinstance(first, Element) and first.tag == "title" and first.text
            assert drawing.attributes["role"] == "img"


def test_equal_documents_give_equal_pages(documents: Documents) -> None:
    page = page_of(documents)
    assert page_of(copy.deepcopy(documents)) == page
    backwards = json.loads(json.dumps(documents), object_pairs_hook=lambda pairs: dict(reversed(pairs)))
    assert page_of(backwards) == page


def test_the_bundle_holds_its_own_page(tiny_bundle: Path, documents: Documents) -> None:
    assert (tiny_bundle / "report.html").read_text(encoding="utf-8") == page_of(documents)


def test_documents_are_not_changed(rich: Documents) -> None:
    before = copy.deepcopy(rich)
    page_of(rich)
    assert rich == before


def hostile(value: Any) -> Any:
    """Every text of a document with markup put after it, but those that say what kind of thing something is."""
    if isinstance(value, dict):
        kept = ("target", "precision", "source", "reads", "writes")
        return {key: entry if key in kept else hostile(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [hostile(entry) for entry in value]
    return value + HOSTILE if isinstance(value, str) else value


def test_whatever_is_given_is_shown_as_text(rich: Documents) -> None:
    given = hostile(rich)
    for record, original in zip(given["passes"]["passes"], rich["passes"]["passes"], strict=True):
        record["name"] = original["name"]  # of a pass
    plain, root = parsed(page_of(rich)), parsed(page_of(given, f"tiny{HOSTILE}.foldgroup"))
    for tag in {element.tag for element in root} - {"wbr"}:
        assert len(root.all(tag)) == len(plain.all(tag)), tag
    attributes = [sorted(e.attributes) for e in root if e.tag != "wbr"]
    assert attributes == [sorted(e.attributes) for e in plain if e.tag != "wbr"]
    assert root.only("script").text == plain.only("script").text
    assert root.only("style").text == plain.only("style").text
    for name in ("layer1.0.conv2", "bottleneck-1-2", "conv_in", "there is no GPU", "input", "Linux"):
        assert any(name in part for part in root.text.split(HOSTILE)[:-1]), name
    assert root.all("option")[0].text == f"layer1.0.conv2{HOSTILE}"
    assert root.all("div", **{"data-layer": f"layer1.0.conv2{HOSTILE}"})


def test_names_of_layers_that_look_alike_have_their_own_masks(documents: Documents) -> None:
    layers = documents["manifest"]["layers"]
    for layer, name in zip(layers, ("a1", chr(0x6131), "a-1"), strict=True):
        layer["name"] = name
    ids = Counter(e.attributes["id"] for e in parsed(page_of(documents)) if "id" in e.attributes)
    assert max(ids.values()) == 1


def without(*path: str) -> Callable[[Documents], None]:
    def change(documents: Documents) -> None:
        place = documents
        for key in path[:-1]:
            place = place[key]
        place.pop(path[-1], None)

    return change


def with_value(value: Any, *path: str) -> Callable[[Documents], None]:
    def change(documents: Documents) -> None:
        place = documents
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value

    return change


def without_groups(documents: Documents) -> None:
    documents["manifest"]["layers"] = []
    documents["passes"]["passes"] = []


@pytest.mark.parametrize(
    ("change", "gone"),
    [
        (without("verification", "profile"), "time"),
        (without("verification", "tuning"), "tuning"),
        (with_value({}, "verification", "tuning"), "tuning"),
        (without_groups, "maps"),
        (with_value([], "manifest", "layers"), None),
        (without("verification", "machine"), None),
        (without("verification", "not_run"), None),
        (with_value({}, "verification", "tiers"), None),
        (with_value({"schema": 1}, "engines"), None),
        (with_value({"classes": []}, "preprocessing"), None),
        (with_value({}, "preprocessing"), None),
        (without("manifest", "targets"), None),
        (without("manifest", "models"), None),
        (without("manifest", "outputs"), None),
        (with_value([], "passes", "passes"), None),
    ],
)
def test_what_a_bundle_has_not_is_left_out(rich: Documents, change: Callable[[Documents], None], gone: str) -> None:
    everything = [e.attributes["id"] for e in parsed(page_of(rich)).all("section")]
    change(rich)
    root = parsed(page_of(rich))
    sections = [e.attributes["id"] for e in root.all("section")]
    assert sections == [key for key in everything if key != gone]
    assert [e.attributes["href"] for e in root.only("nav").all("a")] == [f"#{key}" for key in sections]


def test_an_older_bundle_without_histograms_or_agreement(documents: Documents) -> None:
    for tier in documents["verification"]["tiers"].values():
        del tier["histogram"], tier["top1_agreement"]
    assert "–" in parsed(page_of(documents)).only("section", id="equality").text


def section(documents: Documents, key: str) -> Element:
    return parsed(page_of(documents)).only("section", id=key)


def cells(table: Element) -> list[list[str]]:
    return [[cell.text for cell in row.all("td")] for row in table.only("tbody").all("tr")]


class TestSections:
    def test_groups_of_every_layer_and_its_gate_bits(self, rich: Documents) -> None:
        part = section(rich, "groups")
        learned, found = part.all("table")
        assert cells(found) == [["layer3.0.conv2", "2 of 8→4, 1 of 3→5"]]
        assert cells(learned) == [
            ["layer1.0.conv2", "8 → 8", "101", "2", "4", "2", "73.7 k", "73.7 k"],
            ["layer2.0.conv2", "16 → 16", "0011", "4", "4", "2", "36.9 k", "73.7 k"],
            ["layer2.1.conv2", "16 → 16", "1010", "4", "4", "4", "36.9 k", "36.9 k"],
        ]
        chart = part.only("svg")
        bars, marks = chart.all("rect", **{"class": "one"}), chart.all("path", **{"class": "mark"})
        words = [bar.only("title").text for bar in bars]
        assert words[1] == "layer2.0.conv2: 4 groups learned, 2 run"
        assert len(bars) == len(marks) == len(rich["manifest"]["layers"])
        heights = [float(bar.attributes["height"] or 0) for bar in bars]
        assert heights[1] == heights[2] == 2 * heights[0]  # 4 and 2 groups, on a log₂ axis

    def test_maps_of_every_layer_before_and_after(self, rich: Documents) -> None:
        part = section(rich, "maps")
        names = [layer["name"] for layer in (*rich["manifest"]["layers"], *rich["manifest"]["found"])]
        assert [option.text for option in part.only("select").all("option")] == names
        maps = [e for e in part.all("div") if "data-layer" in e.attributes]
        assert [e.attributes["data-layer"] for e in maps] == names
        assert not any("hidden" in e.attributes for e in maps)  # which only the script does
        captions = [[c.text for c in e.all("figcaption")] for e in maps]
        assert captions[0] == ["as trained: gate bits 101", "reordered: 2 groups"]
        assert captions[1][2] == "as it runs: 2 groups, zeros beside what was learned"
        runs = maps[1].all("svg")[2]
        assert (len(runs.all("rect", **{"class": "three"})), len(runs.all("rect", **{"class": "one"}))) == (2, 4)
        assert captions[3] == ["as trained: groups in its zeros", "reordered: 2 of 8→4, 1 of 3→5"]
        before, after = maps[3].all("svg")
        connected = shaded(before, 20, 14)
        assert (
            connected[np.ix_([*range(7), 11], range(4, 8))].all()
            and connected[np.ix_(range(8, 11), range(8, 13))].all()
        )
        assert connected.sum() == 2 * 8 * 4 + 3 * 5
        assert len(after.all("rect", **{"class": "one"})) == 3

    def test_the_ledger_lists_every_shuffle(self, rich: Documents) -> None:
        part = section(rich, "shuffles")
        entries = [entry for record in rich["passes"]["passes"] for entry in record["shuffles"]]
        assert [row[0] for row in cells(part.only("table"))] == [entry["node"] for entry in entries]
        assert "5 in all: 4 absorbed, 1 kept." in part.text
        assert ["conv_in", "8", "network", "kept", "channels before it are fixed by view"] in cells(part.only("table"))

    def test_equality_by_runtime_with_histograms(self, rich: Documents) -> None:
        part, tiers = section(rich, "equality"), rich["verification"]["tiers"]
        rows = {row[0]: row for row in cells(part.only("table"))}
        assert list(rows) == sorted(tiers)
        tier = tiers["onnxruntime fp32"]
        assert rows["onnxruntime fp32"][1:4] == ["passed", f"{tier['max_error']:.1e}", "0.0001"]
        assert rows["openvino int8"][1] == "FAILED"
        drawings = part.all("figure")
        assert [e.only("figcaption").text for e in drawings] == sorted(tiers)
        assert len(drawings[0].all("rect")) == len(tier["histogram"])
        assert f"{rich['manifest']['certificate']['weights_kept']:,} weights are bit-equal" in part.text
        assert "tensorrt-rtx fp16: there is no GPU" in part.text

    def test_time_of_every_layer_beside_its_limit(self, documents: Documents) -> None:
        part, profile = section(documents, "time"), documents["verification"]["profile"]
        rows = cells(part.only("table"))
        layers = profile["layers"]
        assert [row[0] for row in rows] == [layer["name"] for layer in layers]
        assert [row[2:5] for row in rows] == [
            [f"{layer['us']:.0f}", f"{layer['limit_us']:.0f}", count(layer["macs"])] for layer in layers
        ]
        assert f"{profile['fraction']:.0%} of the time measured" in part.text
        assert f"{profile['median_ms']:.2f} ms" in part.text
        kinds, bars = part.all("svg")
        assert "learned groups" in kinds.text
        assert len(bars.all("rect")) == len(bars.all("path", **{"class": "mark"})) == len(layers)

    def test_many_layers_are_drawn_in_parts_on_one_scale(self, documents: Documents) -> None:
        profile = documents["verification"]["profile"]
        layer = profile["layers"][0]
        profile["layers"] = [{**layer, "name": f"conv{i}", "us": 1 + i % 7, "limit_us": 1} for i in range(60)]
        _, *drawings = section(documents, "time").all("svg")
        bars = [bar for drawing in drawings for bar in drawing.all("rect")]
        assert len(drawings) == 3 and len(bars) == 60
        assert len({bar.attributes["width"] for bar in bars}) == 7

    @pytest.mark.parametrize(("threads", "words"), [(1, "1 thread,"), (2, "2 threads,")])
    def test_threads_are_counted(self, documents: Documents, threads: int, words: str) -> None:
        documents["verification"]["profile"]["threads"] = threads
        assert f"onnxruntime fp32, {words} batch 1" in section(documents, "time").text

    def test_how_layers_run_and_what_tuning_won(self, rich: Documents) -> None:
        part = section(rich, "tuning")
        assert "16→16 3×3 at 8×8, 4 groups learned, 2 run; 1 layer" in part.text
        assert "measured on the machine that compiled it; threads as the runtime chooses, batch 1" in part.text
        assert "measured it is 1.250 times as fast" in part.text
        drawing = part.only("svg")
        titles = [bar.only("title").text for bar in drawing.all("rect")]
        assert titles == ["1 groups: 9.1 µs", "2 groups: 9.2 µs", "4 groups: 9.4 µs"]
        assert drawing.only("rect", **{"class": "two"}).only("title").text == "2 groups: 9.2 µs"

    def test_code_for_every_target_compiles(self, rich: Documents) -> None:
        part = section(rich, "deploy")
        headings = [e.text for e in part.all("h3")]
        targets = [f"{entry['target']} {entry['precision']}" for entry in rich["manifest"]["targets"]]
        assert headings == [*targets, "Triton Inference Server", "Check it where it will run"]
        code = [e.text for e in part.all("code")]
        for text, file in zip(code, ("onnx", "int8.onnx", "rtx.plan", "pt2", "fp16.onnx"), strict=False):
            compile(text, "page", "exec")
            assert f"'model.{file}'" in text
        assert "(1, 3, 16, 16)" in code[0] and "[logits] = " in code[0]
        assert "shorter side has 16 pixels" in part.text

    def test_the_code_runs_as_it_stands(
        self, tiny_bundle: Path, documents: Documents, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        documents["manifest"]["targets"] += [{"target": "openvino", "precision": "fp32"}]
        codes = [e.text for e in section(documents, "deploy").all("code")]
        monkeypatch.chdir(tiny_bundle)
        for code, module in zip(codes[:2], ("onnxruntime", "openvino"), strict=True):
            pytest.importorskip(module)
            names: dict[str, Any] = {}
            exec(code, names)
            assert names["logits"].shape == (1, 5)

    def test_a_bundle_with_spaces_in_its_name(self, documents: Documents) -> None:
        assert "foldgroup verify 'my net.foldgroup'" in parsed(page_of(documents, "my net.foldgroup")).text

    def test_where_it_comes_from(self, documents: Documents) -> None:
        rows = dict(cells(section(documents, "provenance").only("table")))
        assert rows["checkpoint, SHA-256"] == documents["manifest"]["checkpoint"]["sha256"]
        assert f"processor: {documents['verification']['machine']['processor']}" in rows["measured on"]


class TestHeadline:
    def test_costs_and_verdict(self, documents: Documents) -> None:
        header = parsed(page_of(documents)).only("header")
        assert header.only("h1").text == "bottleneck-1-2: tiny.foldgroup"
        assert "proven equal to the trained network" in header.text
        shown = {card.only("dt").text: card.only("dd").text for card in header.all("div", **{"class": "card"})}
        assert shown["multiply-adds as trained"] == "776 kof one image"
        assert shown["as it runs"] == "481 k1.61 times fewer"
        assert shown["time of one batch"].startswith(f"{documents['verification']['profile']['median_ms']:.2f} ms")

    def test_a_failed_certificate_or_tier_is_not_called_equal(self, documents: Documents) -> None:
        wrong = copy.deepcopy(documents)
        wrong["manifest"]["certificate"] |= {"holds": False, "failure": "weight 3 of conv1 <is> another"}
        page = parsed(page_of(wrong))
        assert "NOT shown equal" in page.only("header").text
        assert "does not hold: weight 3 of conv1 <is> another" in page.text
        documents["verification"]["tiers"]["onnxruntime fp32"]["passed"] = False
        assert "NOT shown equal" in parsed(page_of(documents)).only("header").text


def drawn(mask: Element, side: int) -> npt.NDArray[np.bool_]:
    """The mask [C_in, C_out] that a drawing shows, read off its definitions."""
    levels = {f"#{e.attributes['id']}": e for e in mask.only("defs").all("g")}

    def paint(use: Element, top: float, left: float, extent: float, into: npt.NDArray[np.bool_]) -> None:
        level = levels[use.attributes["href"] or ""]
        uses = level.all("use")
        if not uses:
            y, x, size = (round(v) for v in (top, left, extent))
            into[y : y + size, x : x + size] = True
        scale = re.match(r"scale\((.*)\)", level.attributes.get("transform") or "scale(1)")
        assert scale is not None
        inner = extent * float(scale[1])
        for one in uses:
            down, right = (float(one.attributes[axis] or 0) for axis in "yx")
            paint(one, top + down * inner, left + right * inner, inner, into)

    painted = np.zeros((side, side), bool)
    paint(next(e for e in mask.all("use") if "x" not in e.attributes), 0, 0, side, painted)
    return painted


@given(st.sampled_from([2, 6, 12, 16, 30]), st.data())
def test_the_mask_drawn_is_that_of_the_gate_bits(channels: int, data: st.DataObject) -> None:
    factors = factorize(channels, channels)
    bits = data.draw(st.lists(st.integers(0, 1), min_size=len(factors), max_size=len(factors)))
    mask = parsed(svg.mask("conv", channels, channels, bits)).only("svg")
    np.testing.assert_array_equal(drawn(mask, channels), kronecker_mask(factors, bits))


@given(st.sampled_from([(4, 8), (12, 4), (6, 9)]), st.data())
def test_rectangular_masks_are_drawn_over_the_digits_they_share(shape: tuple[int, int], data: st.DataObject) -> None:
    factors = factorize(*shape)
    bits = [*data.draw(st.lists(st.integers(0, 1), min_size=len(factors) - 1, max_size=len(factors) - 1)), 1]
    side = int(np.gcd(*shape))
    mask = drawn(parsed(svg.mask("conv", *shape, bits)).only("svg"), side)
    spread = np.kron(mask, np.ones((shape[0] // side, shape[1] // side), bool))
    np.testing.assert_array_equal(spread, kronecker_mask(factors, bits))


def test_a_mask_with_thousands_of_channels_stays_small() -> None:
    assert len(svg.mask("conv", 4096, 4096, [0, 1] * 6)) < 20_000
    assert svg.blocks("groups", 4096).count("<rect") == svg.MOST_BLOCKS + 1


def shaded(mask: Element, rows: int, columns: int) -> npt.NDArray[np.float64]:
    """The share of every cell that connects, rounded up to a shade, read off a drawing's paths."""
    shares = np.zeros((rows, columns))
    for path in mask.all("path"):
        for x, y, width in re.findall(r"M(\d+) (\d+)h(\d+)v1H\1z", path.attributes["d"] or ""):
            shares[int(y), int(x) : int(x) + int(width)] += float(path.attributes["fill-opacity"] or 0)
    return shares


@given(arrays(bool, array_shapes(min_dims=2, max_dims=2, max_side=12)))
def test_a_mask_without_digits_is_drawn_as_it_is(connected: npt.NDArray[np.bool_]) -> None:
    mask = parsed(svg.scattered("conv", connected)).only("svg")
    np.testing.assert_array_equal(shaded(mask, *connected.shape), connected)


def test_the_cells_of_many_channels_are_as_dark_as_they_are_full() -> None:
    connected = np.zeros((4 * svg.MOST_CELLS, svg.MOST_CELLS + 1), bool)
    connected[:4, 0] = connected[4:6, 0] = connected[8, 0] = True
    shares = shaded(parsed(svg.scattered("conv", connected)).only("svg"), svg.MOST_CELLS, svg.MOST_CELLS)
    assert shares[:4, 0].tolist() == [1, 0.5, 0.25, 0] and shares.sum() == 1.75
    random = np.random.default_rng(0).random((2048, 2048)) < 0.1
    assert len(svg.scattered("conv", random)) < 100_000


def test_groups_of_any_widths_are_drawn_one_after_the_other() -> None:
    body = parsed(svg.diagonal("conv", [(1, 2), (3, 2)], side=40)).all("rect", **{"class": "one"})
    places = [[float(rect.attributes[key] or 0) for key in ("x", "y", "width", "height")] for rect in body]
    assert places == [[0, 0, 20, 10], [20, 10, 20, 30]]
    assert svg.diagonal("conv", [(1, 1)] * 1000).count('class="one"') <= svg.MOST_BLOCKS


def test_a_histogram_of_nothing() -> None:
    assert parsed(histogram("onnxruntime fp32", [0] * 11)).all("rect")
