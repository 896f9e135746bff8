"""Tuning a network: what wins whole, in runtimes and times that are made up, and what every variant gets in the end."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from typing_extensions import Self

from foldgroup import tuned as module
from foldgroup.checkpoint import load_network
from foldgroup.conv_calls import grouped_convs
from foldgroup.conv_shape import ConvShape, Execution
from foldgroup.errors import TuningError
from foldgroup.folding import Folded, fold_traced, trace_network
from foldgroup.lowering import Form
from foldgroup.measure import Measurement
from foldgroup.planning.cost import Cost
from foldgroup.targets import TARGETS, Variant
from foldgroup.tuned import (
    AS_LEARNED,
    LEAST_ROUNDS,
    TUNED,
    UNTUNED,
    WHOLE_SECONDS,
    Costs,
    NetworkTuner,
    Plan,
    Tuned,
    TuningOptions,
    plans_of,
)
from foldgroup.tuning.database import ENVIRONMENT, Database
from foldgroup.tuning.race import Timing
from foldgroup.tuning.table import CostTable, table_of

ORT, OPENVINO = (Variant(TARGETS[name], "fp32") for name in ("onnxruntime", "openvino"))
SHAPE = (1, 3, 6, 6)
LAYER, GROUPS = "1", 8


def folded(seed: int = 0) -> Folded:
    """A network whose layer :data:`LAYER` has :data:`GROUPS` groups; one for each seed."""
    return _folded(seed)


@cache
def _folded(seed: int) -> Folded:
    torch.manual_seed(seed)
    layers = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 3, padding=1, groups=GROUPS), nn.ReLU(), nn.Conv2d(16, 4, 1)
    traced = trace_network(load_network(nn.Sequential(*layers)), input_shape=SHAPE[1:])
    return fold_traced(traced)


def calls_of(network: Folded) -> list[ConvShape]:
    return [shape for calls in grouped_convs(network.folded).values() for shape in calls]


def preferring(groups: int, network: Folded | None = None) -> CostTable:
    """Costs by which so many groups are the fastest."""
    times = {Execution(g): 100.0 if g == groups else 900.0 for g in (1, 2, 4, 8)}
    return table_of(dict.fromkeys(calls_of(network or folded()), times), 0.5, "measured")


class FakeTuner:
    """Stands for :class:`Tuner`: gives the costs in :attr:`costs`, or says why it cannot."""

    costs: Mapping[Variant, CostTable | TuningError]

    def __init__(self, variant: Variant, database: Database, *options: Any) -> None:
        self.variant, self.database, self.options = variant, database, options
        self.measured: dict[ConvShape, dict[Execution, Timing]] = {}
        self.unmeasured: list[ConvShape] = []
        self.remembered = 2

    def __call__(self, calls: Iterable[ConvShape]) -> CostTable:
        found = self.costs[self.variant]
        if isinstance(found, TuningError):
            raise found
        self.unmeasured = [shape.run_as(1) for shape in calls][:1]
        return found


@dataclass
class Runtime:
    """A runtime in which a network takes the milliseconds that its layer's groups are said to, and a noise."""

    milliseconds: Mapping[int, float]
    noise: float = 0.0
    refolded: Callable[[], Folded] = folded
    options: TuningOptions = field(default_factory=lambda: TuningOptions(measure=True))
    timed: list[dict[str, Any]] = field(default_factory=list)
    runners: list[tuple[Variant, int, Any]] = field(default_factory=list)
    refolds: list[Cost] = field(default_factory=list)
    steps: list[str] = field(default_factory=list)

    def runner(self, variant: Variant, content: bytes, **options: Any) -> Network:
        self.runners.append((variant, int(content), options))
        return Network(int(content))

    def interleave(self, calls: Mapping[str, Any], **limits: Any) -> Measurement:
        assert {len(sessions) for sessions in calls.values()} == {module.sessions_for(self.options.batch)}
        groups = {name: sessions[0].func.__self__.groups for name, sessions in calls.items()}
        (shape,) = {call.args[0].shape for sessions in calls.values() for call in sessions}
        self.timed.append({"groups": groups, "shape": shape, **limits})
        drift = np.random.default_rng(0).lognormal(0, self.noise, (20, len(groups)))
        return Measurement(
            {name: tuple(self.milliseconds[g] * drift[:, i]) for i, (name, g) in enumerate(groups.items())}
        )

    def refold(self, cost: Callable[[Iterable[ConvShape]], Cost]) -> Folded:
        network = self.refolded()
        self.refolds.append(cost(calls_of(network)))
        return network

    def content(self, form: Form, variant: Variant) -> bytes:
        return str(form.executions.get(LAYER, Execution(GROUPS)).groups).encode()

    def tune(self, untuned: Mapping[Variant, Plan]) -> dict[Variant, Tuned]:
        self.tuner = NetworkTuner(self.options, self.refold, self.content, (7, *SHAPE[1:]), self.steps.append)
        return self.tuner.tune(untuned)


@dataclass
class Network:
    """A runner of a network whose layer runs as so many groups."""

    groups: int

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def outputs(self, images: object) -> None:
        raise AssertionError("times are made up")


Make = Callable[..., Runtime]


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Make:
    def make(
        milliseconds: Mapping[int, float] | None = None,
        costs: Mapping[Variant, CostTable | TuningError] | None = None,
        **options: Any,
    ) -> Runtime:
        made = Runtime(milliseconds or {}, **options)
        monkeypatch.setattr(module, "make_runner", made.runner)
        monkeypatch.setattr(module, "interleave", made.interleave)
        monkeypatch.setattr(FakeTuner, "costs", costs or {}, raising=False)
        return made

    monkeypatch.setattr(module, "Tuner", FakeTuner)
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path / "t.sqlite"))
    return make


def plan_of(network: Folded, table: CostTable) -> Plan:
    """Of a network in the order that its own costs ask for."""
    return Plan(network, table, table)


def documented(tuned: Tuned, options: TuningOptions) -> dict[str, Any]:
    """What is written down of it."""
    return tuned.as_dict(options, tuned.plan.form(tuned.variant.precision))


def groups_of(tuned: Tuned) -> int:
    """How many groups the layer ships with."""
    executions = tuned.plan.form(tuned.variant.precision).executions
    return executions.get(LAYER, Execution(GROUPS)).groups


class TestWhatWins:
    """Untuned the layer has 4 groups, tuned 1, as learned 8."""

    @pytest.mark.parametrize(
        ("milliseconds", "winner", "groups"),
        [
            ({4: 10, 1: 5, 8: 20}, TUNED, 1),
            ({4: 10, 1: 5, 8: 6}, TUNED, 1),
            ({4: 10, 1: 6, 8: 5}, AS_LEARNED, 8),
            ({4: 10, 1: 20, 8: 5}, AS_LEARNED, 8),
            ({4: 10, 1: 11, 8: 12}, UNTUNED, 4),
            ({4: 10, 1: 10, 8: 10}, UNTUNED, 4),
        ],
    )
    def test_is_what_is_fastest_as_a_whole(
        self, runtime: Make, milliseconds: Mapping[int, float], winner: str, groups: int
    ) -> None:
        made = runtime(milliseconds, {ORT: preferring(1)}, noise=0.01)
        found = made.tune({ORT: plan_of(folded(), preferring(4))})[ORT]
        assert made.timed[0]["groups"] == {UNTUNED: 4, TUNED: 1, AS_LEARNED: 8}
        assert found.whole is not None
        assert found.whole.winner == winner
        assert groups_of(found) == groups
        reasons = {
            TUNED: "faster as a whole than untuned",
            AS_LEARNED: "as learned it is faster as a whole",
            UNTUNED: "the untuned network is kept: nothing is faster as a whole beyond the noise",
        }
        assert found.reason == reasons[winner]

    def test_is_never_what_is_faster_within_the_noise(self, runtime: Make) -> None:
        made = runtime({4: 10.0, 1: 9.9, 8: 9.95}, {ORT: preferring(1)}, noise=0.3)
        found = made.tune({ORT: plan_of(folded(), preferring(4))})[ORT]
        assert found.whole is not None
        assert found.whole.winner == UNTUNED
        assert groups_of(found) == 4

    def test_is_not_as_learned_if_that_beats_the_untuned_alone(self, runtime: Make) -> None:
        made = runtime({4: 10.0, 1: 5.0, 8: 4.99}, {ORT: preferring(1)}, noise=0.1)
        assert groups_of(made.tune({ORT: plan_of(folded(), preferring(4))})[ORT]) == 1

    def test_is_timed_with_the_options_given(self, runtime: Make) -> None:
        options = TuningOptions(measure=True, seconds=30.0, threads=2, batch=5)
        made = runtime({4: 10, 1: 5, 8: 20}, {ORT: preferring(1)}, options=options)
        made.tune({ORT: plan_of(folded(), preferring(4))})
        (timed,) = made.timed
        assert timed["shape"] == (5, *SHAPE[1:])
        assert (timed["max_seconds"], timed["min_rounds"]) == (10.0, LEAST_ROUNDS)
        loaded = [(ORT, groups, {"threads": 2}) for groups in (4, 1, 8)]
        assert made.runners == loaded * module.sessions_for(5)
        assert made.steps == ["tuning for onnxruntime fp32: whole networks…"]

    def test_takes_no_more_than_its_time(self, runtime: Make) -> None:
        options = TuningOptions(measure=True, seconds=3600.0)
        made = runtime({4: 10, 1: 5, 8: 20}, {ORT: preferring(1)}, options=options)
        made.tune({ORT: plan_of(folded(), preferring(4))})
        assert made.timed[0]["max_seconds"] == WHOLE_SECONDS


class TestWhatIsTimed:
    def test_nothing_if_all_are_one_network(self, runtime: Make) -> None:
        made = runtime({}, {ORT: preferring(8)})
        found = made.tune({ORT: plan_of(folded(), CostTable())})[ORT]
        assert (made.timed, made.runners, found.whole) == ([], [], None)
        assert found.reason == "every layer runs as it would untuned"
        assert found.plan.table.source == "measured"

    @pytest.mark.parametrize(("learned_ms", "groups"), [(20.0, 4), (5.0, 8)])
    def test_what_was_learned_if_tuning_changed_nothing(self, runtime: Make, learned_ms: float, groups: int) -> None:
        made = runtime({4: 10.0, 8: learned_ms}, {ORT: preferring(4)})
        found = made.tune({ORT: plan_of(folded(), preferring(4))})[ORT]
        assert made.timed[0]["groups"] == {UNTUNED: 4, AS_LEARNED: 8}
        assert groups_of(found) == groups
        expected = {4: "every layer runs as it would untuned", 8: "as learned it is faster as a whole"}
        assert found.reason == expected[groups]

    def test_the_tuned_once_if_it_is_as_learned(self, runtime: Make) -> None:
        made = runtime({4: 10.0, 8: 5.0}, {ORT: preferring(8)})
        found = made.tune({ORT: plan_of(folded(), preferring(4))})[ORT]
        assert made.timed[0]["groups"] == {UNTUNED: 4, TUNED: 8}
        assert groups_of(found) == 8

    def test_the_tuned_against_what_was_learned_if_no_model_packs(self, runtime: Make) -> None:
        made = runtime({8: 10.0, 1: 5.0}, {ORT: preferring(1)})
        found = made.tune({ORT: plan_of(folded(), CostTable())})[ORT]
        assert made.timed[0]["groups"] == {UNTUNED: 8, TUNED: 1}
        assert groups_of(found) == 1

    def test_a_network_in_another_order_though_it_has_the_same_groups(self, runtime: Make) -> None:
        other = folded(1)
        made = runtime({4: 10.0, 8: 20.0}, {ORT: preferring(4)}, refolded=lambda: other)
        found = made.tune({ORT: plan_of(folded(), preferring(4))})[ORT]
        assert made.timed[0]["groups"] == {UNTUNED: 4, TUNED: 4, AS_LEARNED: 8}
        assert found.plan.folded is folded()

    def test_an_equal_network_is_the_untuned_one_so_that_it_is_exported_once(self, runtime: Make) -> None:
        equal = _folded.__wrapped__(0)
        made = runtime({4: 10.0, 1: 5.0, 8: 20.0}, {ORT: preferring(1)}, refolded=lambda: equal)
        assert made.tune({ORT: plan_of(folded(), preferring(4))})[ORT].plan.folded is folded()


class TestSeveralVariants:
    @pytest.fixture
    def untuned(self) -> dict[Variant, Plan]:
        return {ORT: plan_of(folded(), preferring(4)), OPENVINO: plan_of(folded(), preferring(2))}

    def test_each_gets_its_own_form_of_one_network(self, runtime: Make, untuned: dict[Variant, Plan]) -> None:
        made = runtime({4: 10, 2: 10, 1: 5, 8: 20}, {ORT: preferring(1), OPENVINO: preferring(4)})
        found = made.tune(untuned)
        assert [timed["groups"][TUNED] for timed in made.timed] == [1, 4]
        assert [(variant, groups_of(tuned)) for variant, tuned in found.items()] == [(ORT, 1), (OPENVINO, 2)]
        assert [cost.source for cost in made.refolds] == ["measured", "counted"]
        assert {id(tuned.plan.folded) for tuned in found.values()} == {id(folded())}

    @pytest.mark.parametrize(("tuned_ms", "seed"), [(5.0, 1), (15.0, 0)], ids=["tuned", "untuned"])
    def test_the_first_ones_winner_decides_the_order_of_all(
        self, runtime: Make, untuned: dict[Variant, Plan], tuned_ms: float, seed: int
    ) -> None:
        costs = {ORT: preferring(1), OPENVINO: preferring(4)}
        made = runtime({4: 10, 2: 10, 1: tuned_ms, 8: 20}, costs, refolded=lambda: folded(1))
        assert {id(tuned.plan.folded) for tuned in made.tune(untuned).values()} == {id(folded(seed))}

    def test_one_that_cannot_be_timed_stays_untuned_and_says_why(
        self, runtime: Make, untuned: dict[Variant, Plan]
    ) -> None:
        made = runtime({4: 10, 2: 10, 1: 5, 8: 20}, {ORT: TuningError("no runtime"), OPENVINO: preferring(1)})
        found = made.tune(untuned)
        assert {variant: groups_of(tuned) for variant, tuned in found.items()} == {ORT: 4, OPENVINO: 1}
        assert (found[ORT].reason, found[ORT].tuner, found[ORT].whole) == ("no runtime", None, None)
        assert made.tuner.notes == {"onnxruntime fp32": "no runtime"}

    def test_a_later_one_that_cannot_be_timed_runs_the_network_of_the_others(
        self, runtime: Make, untuned: dict[Variant, Plan]
    ) -> None:
        costs = {ORT: preferring(1), OPENVINO: TuningError("no runtime")}
        found = runtime({4: 10, 1: 5, 8: 20}, costs, refolded=lambda: folded(1)).tune(untuned)
        assert found[OPENVINO].plan.folded is found[ORT].plan.folded is folded(1)
        assert groups_of(found[OPENVINO]) == 2

    def test_if_none_can_be_timed_the_reasons_are_named(self, runtime: Make, untuned: dict[Variant, Plan]) -> None:
        made = runtime({}, {ORT: TuningError("no runtime"), OPENVINO: TuningError("no licence")})
        with pytest.raises(TuningError, match="nothing can be tuned: no runtime; no licence"):
            made.tune(untuned)


class TestWhatIsRecorded:
    @pytest.mark.parametrize(
        ("milliseconds", "winner"), [({4: 10, 1: 5, 8: 20}, TUNED), ({4: 5, 1: 10, 8: 20}, UNTUNED)]
    )
    def test_the_whole_and_every_layer(self, runtime: Make, milliseconds: Mapping[int, float], winner: str) -> None:
        made = runtime(milliseconds, {ORT: preferring(1)})
        document = documented(made.tune({ORT: plan_of(folded(), preferring(4))})[ORT], made.options)
        assert json.loads(json.dumps(document)) == document
        assert (document["source"], document["threads"], document["batch"]) == ("measured", 1, 1)
        assert document["remembered"] == 2
        assert document["unmeasured"] == [str(calls_of(folded())[0].run_as(1))]
        (layer,) = document["layers"]
        assert (layer["name"], layer["groups"], layer["parts"]) == (LAYER, GROUPS, 1)
        assert layer["runs"] == (1 if winner == TUNED else 4)
        assert [candidate["runs"] for candidate in layer["candidates"]] == [8, 4, 2, 1]
        whole = document["whole"]
        assert whole["median_ms"] == {UNTUNED: milliseconds[4], TUNED: milliseconds[1], AS_LEARNED: 20}
        assert (whole["untuned_ms"], whole["tuned_ms"]) == (milliseconds[4], milliseconds[1])
        assert (whole["challenger"], whole["shipped"]) == (TUNED, winner)
        assert whole["ratio"]["value"] == pytest.approx(milliseconds[4] / milliseconds[1])
        assert whole["ratio"]["low"] <= whole["ratio"]["value"] <= whole["ratio"]["high"]

    def test_measured_times_with_their_intervals(self) -> None:
        tuner = FakeTuner(ORT, Database(Path("none")))
        tuner.measured = {calls_of(folded())[0].run_as(1): {Execution(4): Timing(100.4, 90.0, 110.0, 7)}}
        found = Tuned(ORT, plan_of(folded(), preferring(4)), tuner)  # type: ignore[arg-type]
        candidates = documented(found, TuningOptions())["layers"][0]["candidates"]
        assert candidates[1] == {"runs": 4, "parts": 1, "ns": 100.4, "low": 90.0, "high": 110.0}
        assert candidates[0] == {"runs": 8, "parts": 1, "ns": 900}

    def test_what_only_counts_has_no_layers(self) -> None:
        document = documented(Tuned(ORT, plan_of(folded(), CostTable())), TuningOptions(pack=False))
        assert document == {"source": "counted", "threads": 1, "batch": 1, "layers": []}


class TestCosts:
    def test_are_measured_if_that_is_asked_for(self, runtime: Make, tmp_path: Path) -> None:
        runtime({}, {ORT: preferring(2)})
        costs = Costs(ORT, TuningOptions(measure=True, seconds=9.0, threads=None, batch=3))
        assert costs(calls_of(folded())) == preferring(2)
        assert costs.asked
        assert isinstance(costs.tuner, FakeTuner)
        assert costs.tuner.database.path == tmp_path / "t.sqlite"
        assert costs.tuner.options[2:5] == (None, 3, 9.0)

    def test_are_kept_where_the_options_say(self, runtime: Make, tmp_path: Path) -> None:
        runtime({}, {ORT: preferring(2)})
        costs = Costs(ORT, TuningOptions(measure=True, database=tmp_path / "mine"))
        assert isinstance(costs.tuner, FakeTuner)
        assert costs.tuner.database.path == tmp_path / "mine"

    def test_are_expected_otherwise(self) -> None:
        costs = Costs(ORT, TuningOptions())
        assert (costs.table.source, costs.asked) == ("counted", False)
        assert costs(calls_of(folded())).source == "model"
        assert costs.table.entries.keys() == {shape.run_as(1) for shape in calls_of(folded())}

    def test_progress_names_the_variant(self, runtime: Make) -> None:
        steps: list[str] = []
        costs = Costs(OPENVINO, TuningOptions(measure=True), steps.append)
        assert isinstance(costs.tuner, FakeTuner)
        costs.tuner.options[-1](0.256, "a layer")
        assert steps == ["tuning for openvino fp32, 26%: a layer…"]

    def test_are_asked_for_once_when_plans_are_made(self) -> None:
        asked = count()

        class Counting(Costs):
            def __call__(self, calls: Iterable[ConvShape]) -> CostTable:
                next(asked)
                return super().__call__(calls)

        costs = {variant: Counting(variant, TuningOptions()) for variant in (ORT, OPENVINO)}
        table = costs[ORT](calls_of(folded()))
        plans = plans_of(folded(), costs)
        assert next(asked) == 2
        assert plans[ORT] == plan_of(folded(), table)
        assert plans[OPENVINO].table.source == "model"
