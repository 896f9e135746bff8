"""The whole comparison: G-ResNeXt in every form, known networks, and what one would do without foldgroup.

    python -m bench.compare                     # every setting below; resumable
    python -m bench.compare --settings latency  # one of them
    python -m bench.compare --name compare_avx2 # on one more processor: no result mixes two

*Networks*: G-ResNeXt-50 and -101 at the paper's budgets b (random weights and gates, :mod:`bench.synthetic`) and the
trained example. *Forms*: as trained, a dense kernel under a mask (training); grouped convolutions between shuffles
(shuffle); shuffles absorbed (folded); groups packed by the shipped model (packed), and by measuring here (tuned, for
the setting's target, precision, threads and batch). *Baselines*: ResNeXt 32×4d plain, packed and tuned, and ResNet.
*Otherwise*: the training form in OpenVINO and, masks multiplied in beforehand (which favours it), under torch.compile.

All subjects of one setting are timed interleaved in one run; ratios have paired bootstrap intervals
(:mod:`foldgroup.measure`), and every file is loaded several times, as where its memory lies makes one or two percent.
Subjects of one file, as packed and tuned often are, are timed as one. Beside every time stands its limit: what the
machine must take for the file's multiply-adds and bytes (:mod:`foldgroup.profiling`). Files are kept in ``--work`` and
measurements in the result, so an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from hashlib import sha256
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import nn

import foldgroup
from bench.synthetic import write_checkpoint
from foldgroup.candidates import TRAINING, baseline_network, training_form
from foldgroup.checkpoint import load_network
from foldgroup.emit.onnx import export_onnx
from foldgroup.emit.precision import typed
from foldgroup.folding import fold
from foldgroup.measure import interleave, machine, sessions_for
from foldgroup.profiling import Profile, profile
from foldgroup.profiling.limits import RUNTIMES
from foldgroup.targets import Variant, find_target, make_runner

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
EXAMPLE = ROOT / "examples" / "g_resnext17_cifar10.pt"
BUDGETS = (32, 64, 96, 128)
FORMS = ("training", "shuffle", "folded", "packed", "tuned")
BASELINES = {"g_resnext50": ("resnext50_32x4d", "resnet50"), "g_resnext101": ("resnext101_32x4d", "resnet101")}
TUNE_SECONDS = 45.0
PROFILE_SECONDS = 2.0
OPENVINO = ("openvino:fp32", "openvino:bf16", "openvino:int8")


@dataclass(frozen=True)
class Subject:
    """A network in a form. ``network`` is ``arch``, or ``arch@b#seed`` with synthetic gates."""

    network: str
    form: str
    variant: str = "onnxruntime:fp32"

    def __str__(self) -> str:
        where = "" if self.variant == "onnxruntime:fp32" else f", {self.variant.replace(':', ' ')}"
        return f"{self.network} {self.form}{where}"


@dataclass(frozen=True)
class Setting:
    """What is timed together, and how."""

    name: str
    subjects: tuple[Subject, ...]
    threads: int = 1
    batch: int = 1
    seconds: float = 40.0
    profiled: bool = False
    """Whether every layer is timed too."""

    @property
    def pairs(self) -> Iterable[tuple[Subject, Subject]]:
        """The comparisons to report: each tuned or only form against everything else in its variant."""
        own = [s for s in self.subjects if s.form == "tuned" and "@" in s.network] or list(self.subjects[:1])
        return [(other, mine) for mine in own for other in self.subjects if other != mine]


def settings(threads: int) -> dict[str, list[Setting]]:
    """Every setting by kind; ``threads`` are all that there are."""
    found: dict[str, list[Setting]] = {kind: [] for kind in ("latency", "seeds", "threads", "throughput", "precisions")}
    for arch, baselines in BASELINES.items():
        for b in BUDGETS if arch == "g_resnext50" else (32, 128):
            name = f"{arch}@{b}#0"
            others = [Subject(name, form) for form in FORMS] + _baselines(baselines)
            if b == BUDGETS[0]:
                others += [Subject(name, "training", "openvino:fp32"), Subject(name, "torch.compile of training")]
            found["latency"].append(Setting(f"{name} latency", tuple(others), profiled=True))
    for b in (32, 128):
        for seed in range(1, 5):
            name = f"g_resnext50@{b}#{seed}"
            subjects = [Subject(name, form) for form in ("training", "folded", "packed", "tuned")]
            found["seeds"].append(Setting(f"{name} latency", (*subjects, *_baselines(("resnext50_32x4d",)))))
    main, resnets = "g_resnext50@32#0", BASELINES["g_resnext50"]
    few = [Subject(main, form) for form in FORMS if form != "shuffle"] + _baselines(resnets)
    found["threads"].append(Setting(f"{main} {threads} threads", tuple(few), threads=threads))
    for batch in (8, 64):
        for count in (1, threads):
            setting = Setting(f"{main} batch {batch}, {count} threads", tuple(few), count, batch, 180.0)
            found["throughput"].append(setting)
    for name in ("example", main):
        baseline = () if name == "example" else ("plain", "tuned")
        others = [Subject("resnext50_32x4d", form, v) for v in OPENVINO for form in baseline]
        forms, variants = ("folded", "packed", "tuned"), ("onnxruntime:fp32", *OPENVINO)
        mine = [Subject(name, form, variant) for variant in variants for form in forms]
        found["precisions"].append(Setting(f"{name} precisions", (*mine, *others), profiled=True))
    return found


def _baselines(names: Iterable[str]) -> list[Subject]:
    return [
        Subject(name, form)
        for name in names
        for form in (("plain", "packed", "tuned") if name.startswith("resnext") else ("plain",))
    ]


# ---- files -----------------------------------------------------------------------------------------------------


@dataclass
class Files:
    """ONNX files of subjects, made once and kept in ``work``."""

    work: Path
    images: Path | None
    """Folder of images to calibrate int8 on."""

    def get(self, subject: Subject, setting: Setting) -> tuple[bytes, dict[str, Any]]:
        """The file of a subject for a setting, and what is known of it."""
        tuned_for = f"_{setting.threads}x{setting.batch}" if subject.form == "tuned" else ""
        stem = f"{subject.network}_{subject.form}_{subject.variant}{tuned_for}".replace(":", "_").replace("@", "_b")
        path = self.work / f"{stem.replace('#', '_s')}.onnx"
        facts = path.with_suffix(".json")
        if not facts.is_file():
            content, known = self._make(subject, setting, path.with_suffix(".foldgroup"))
            path.write_bytes(content)
            if subject.variant == "onnxruntime:fp32":
                known["peak_bytes"] = peak_memory(path)
            facts.write_text(json.dumps(known), encoding="utf-8")
        return path.read_bytes(), {**json.loads(facts.read_text(encoding="utf-8")), "file_bytes": path.stat().st_size}

    def _make(self, subject: Subject, setting: Setting, bundle: Path) -> tuple[bytes, dict[str, Any]]:
        if subject.form == "shuffle":
            return self._shuffle_form(subject)
        target, _, precision = subject.variant.partition(":")
        variant = Variant(find_target(target), precision)
        start = perf_counter()
        compiled = foldgroup.compile(
            self.source(subject.network),
            bundle,
            example_input=None if self._is_file(subject.network) else (1, 3, 224, 224),
            target=[subject.variant],
            engine=False,
            packing=subject.form in ("packed", "tuned"),
            tune=subject.form == "tuned",
            tune_budget=TUNE_SECONDS,
            threads=setting.threads,
            batch=(1, setting.batch, 64),
            tuning_db=self.work / "tuning.sqlite",
            calibrate=self.images if precision == "int8" else None,
            calibration_images=64,
            force=True,
        )
        seconds = perf_counter() - start
        content, macs = compiled.content(variant), compiled.model(variant)["macs"]
        if subject.form == "training":
            dense = training_form(compiled, variant)
            assert dense is not None
            content, macs = dense.content, dense.macs
        key = TRAINING.partition(" ")[0] if subject.form == "training" else "folded"
        known = {"macs": macs, "params": compiled.manifest["params"][key], "compile_seconds": round(seconds, 2)}
        if subject.form == "tuned":
            known["tuning"] = compiled.verification["tuning"][str(variant)].get("whole")
        return content, known

    def _shuffle_form(self, subject: Subject) -> tuple[bytes, dict[str, Any]]:
        from foldgroup.counts import macs, params
        from passes import default_pipeline

        pipeline = default_pipeline().without("absorb_shuffles")
        graph = fold(load_network(self.source(subject.network)), pipeline=pipeline).folded
        shape = next(iter(graph.graph.nodes)).meta["shape"]
        return export_onnx(typed(graph, torch.float32), tuple(shape)), {"macs": macs(graph), "params": params(graph)}

    def _is_file(self, network: str) -> bool:
        return network == "example" or "@" in network

    def source(self, network: str) -> Path | nn.Module:
        """The checkpoint of a network with learned groups, or a baseline with random weights."""
        if network == "example":
            return EXAMPLE
        if "@" not in network:
            return baseline_network(network, 1000)
        arch, _, rest = network.partition("@")
        budget, _, seed = rest.partition("#")
        path = self.work / f"{arch}_{budget}_{seed}.pt"
        if not path.is_file():
            write_checkpoint(path, arch, int(seed), int(budget))
        return path


# ---- measuring -------------------------------------------------------------------------------------------------


def measure(setting: Setting, files: Files) -> tuple[dict[str, Any], dict[str, Profile]]:
    """One setting: every subject's times and facts, and the ratios; and the profiles of subjects, where asked for."""
    entries: dict[str, dict[str, Any]] = {}
    profiles: dict[str, Profile] = {}
    timed_as = {str(subject): str(subject) for subject in setting.subjects}
    with ExitStack() as stack:
        loads: dict[str, Callable[[], Callable[[], object]]] = {}
        first: dict[tuple[str, bytes], str] = {}
        for subject in setting.subjects:
            if subject.form.startswith("torch.compile"):
                loads[str(subject)] = cache(partial(_torch_compiled, files, subject, setting))
                entries[str(subject)] = {}
                continue
            content, facts = files.get(subject, setting)
            entries[str(subject)] = facts
            timed_as[str(subject)] = first.setdefault((subject.variant, sha256(content).digest()), str(subject))
            print(f"{setting.name}: {subject} ready", file=sys.stderr, flush=True)
            if timed_as[str(subject)] != str(subject):
                continue
            target, _, precision = subject.variant.partition(":")
            variant = Variant(find_target(target), precision)
            shape = _input_shape(content)
            images = np.random.default_rng(0).standard_normal((setting.batch, *shape)).astype(np.float32)
            if setting.profiled and target in RUNTIMES:
                profiles[str(subject)] = profile(variant, content, images, setting.threads, seconds=PROFILE_SECONDS)
            loads[str(subject)] = partial(_session, stack, variant, content, images, setting.threads)
        calls: dict[str, list[Callable[[], object]]] = {name: [] for name in loads}
        for _ in range(sessions_for(setting.batch)):  # one of each in turn: what is loaded late lies elsewhere
            for name, load in loads.items():
                calls[name].append(load())
        measured = interleave(calls, warmup=2, min_rounds=7, max_seconds=setting.seconds)
    profiles |= {name: profiles[timed] for name, timed in timed_as.items() if timed in profiles}
    for name, entry in entries.items():
        stats = measured.stats(timed_as[name])
        entry |= {**asdict(stats), "images_per_second": measured.throughput(timed_as[name], setting.batch)}
        if name in profiles:
            entry |= {"limit_ms": profiles[name].limit_ms, "fraction": profiles[name].limit_ms / stats.median_ms}
    ratios = [
        {"of": mine, "over": other, **asdict(measured.ratio(timed_as[other], timed_as[mine]))}
        for other, mine in (map(str, pair) for pair in setting.pairs)
    ]
    limits = {f"{p.target} {p.precision}": asdict(p.limits) for p in profiles.values()}
    result = {"threads": setting.threads, "batch": setting.batch, "subjects": entries, "speed_ups": ratios}
    return result | ({"limits": limits} if limits else {}), profiles


def _session(
    stack: ExitStack, variant: Variant, content: bytes, images: npt.NDArray[np.float32], threads: int
) -> Callable[[], object]:
    """The file, loaded once more."""
    return partial(stack.enter_context(make_runner(variant, content, threads=threads)).outputs, images)


def _torch_compiled(files: Files, subject: Subject, setting: Setting) -> Callable[[], object]:
    """The training form under torch.compile, every mask multiplied into its kernel once."""
    from passes import DecodeGates

    torch.set_num_threads(setting.threads)
    checkpoint = load_network(files.source(subject.network))
    from foldgroup.trace import trace

    graph = DecodeGates().run(trace(checkpoint.model, (1, 3, 224, 224))).graph.eval()
    compiled = torch.compile(graph)
    images = torch.randn(setting.batch, 3, 224, 224)

    def call() -> object:
        with torch.inference_mode():
            return compiled(images)

    call()
    return call


def _input_shape(content: bytes) -> tuple[int, ...]:
    graph = onnx.load_from_string(content).graph
    return tuple(axis.dim_value for axis in graph.input[0].type.tensor_type.shape.dim)[1:]


_PEAK = """
import re, sys, numpy as np
from pathlib import Path
import onnxruntime as ort
options = ort.SessionOptions(); options.intra_op_num_threads = 1
session = ort.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
shape = [1, *session.get_inputs()[0].shape[1:]]
for _ in range(3):
    session.run(None, {"input": np.zeros(shape, np.float32)})
print(1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]))
"""


def peak_memory(path: Path) -> int:
    """Most memory resident in a process that does nothing but run the ONNX file in ONNX Runtime, in bytes (Linux).

    Not of ``getrusage``, which starts from what the parent held.
    """
    ran = subprocess.run([sys.executable, "-c", _PEAK, str(path)], check=True, capture_output=True, text=True)
    return int(ran.stdout)


def main() -> None:
    """Measure what the result does not hold yet."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--settings", action="append", help="latency, seeds, threads, throughput or precisions")
    parser.add_argument("--match", default="", help="only settings whose name has this in it")
    parser.add_argument("--images", type=Path, help="images that int8 is calibrated on; else it is left out")
    parser.add_argument("--seconds", type=float, help="for each setting, in place of its own")
    parser.add_argument("--work", type=Path, default=Path("bench_work"), help="folder of the networks' files")
    parser.add_argument("--name", default="compare", help="of the result; compare_… for one more processor")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    run(arguments.settings, arguments.match, Files(arguments.work, arguments.images), arguments.seconds, arguments.name)


def run(kinds: list[str] | None, match: str, files: Files, seconds: float | None, name: str = "compare") -> None:
    """Measure settings of these kinds that are not in the result yet, saving after each."""
    path = RESULTS / f"{name}.json"
    here = machine()
    document = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"settings": {}, "machine": here}
    there = document["machine"]
    if any(there[key] != here[key] for key in ("processor", "isa")):
        raise SystemExit(f"{path.name} is of another processor, {there['processor']}: give --name")
    every = settings(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    for setting in (s for kind in kinds or every for s in every[kind] if match in s.name):
        if setting.name in document["settings"]:
            continue
        able = tuple(s for s in setting.subjects if _runs_here(s, files.images))
        used = replace(setting, subjects=able, seconds=seconds or setting.seconds)
        document["settings"][setting.name], profiles = measure(used, files)
        with (RESULTS / f"{name}_layers.jsonl").open("a", encoding="utf-8") as lines:
            for subject, found in profiles.items():
                layers = [[e.name, e.kind, round(e.us, 1), round(e.limit_us, 1)] for e in found.layers]
                lines.write(json.dumps({"setting": setting.name, "subject": subject, "layers": layers}) + "\n")
        document["machine"] = machine()
        path.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _runs_here(subject: Subject, images: Path | None) -> bool:
    """Whether there are images for what is calibrated, and OpenVINO does not refuse bf16 on this processor."""
    if subject.variant == "openvino:bf16":
        import openvino

        return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return images is not None or not subject.variant.endswith("int8")


def ratio(document: Mapping[str, Any], setting: str, of: str, over: str) -> Mapping[str, float]:
    """One speed-up of a result."""
    entries = document["settings"][setting]["speed_ups"]
    found: Mapping[str, float] = next(e for e in entries if (e["of"], e["over"]) == (of, over))
    return found


if __name__ == "__main__":
    main()
