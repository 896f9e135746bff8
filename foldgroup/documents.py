"""The files of a bundle that foldgroup reads itself, and the page that people read, from what a compile came to.

The manifest and ``passes.json`` say what was built, from what and how; ``engines.json`` which engines there are;
``verification.json`` what was measured here, with the machine and the times.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from foldgroup import bundle as files
from foldgroup.bundle import file_entry, to_json
from foldgroup.checkpoint import Preprocessing
from foldgroup.compile_options import Job
from foldgroup.emit.engine import Engine
from foldgroup.emit.preprocess import with_preprocessing
from foldgroup.engines import entry
from foldgroup.handover import Repository
from foldgroup.measure import machine
from foldgroup.networks import Networks
from foldgroup.pipeline import PassRecord
from foldgroup.report.page import report_page
from foldgroup.targets import Variant
from foldgroup.tiers import Tiers

WORST_LAYERS = 5
"""How many layers ``verification.json`` names for each precision."""


@dataclass(frozen=True)
class Outcome:
    """What came of the networks of one compile: engines, and what running everything told."""

    engines: Mapping[Variant, Engine]
    tiers: Tiers
    repository: Repository = field(default_factory=Repository)
    """For an inference server."""
    profile: Mapping[str, Any] | None = None
    """Where the time goes, if something ran here on the processor."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """That the steps of the compile took."""


def bundle_files(
    name: str,
    networks: Networks,
    outcome: Outcome,
    preprocessing: Preprocessing | None,
    options: Mapping[str, Any],
    job: Job,
) -> dict[str, bytes]:
    """Every file of the bundle ``name``; ``options`` are those that the checkpoint was read with."""
    first, lowered, engines = job.precisions[0], networks.lowered, outcome.engines
    content = {
        files.PASSES: to_json(
            {
                "options": options,
                "notes": networks.notes,
                "passes": [_record(record) for record in networks.records],
                "costs": networks.planned_by.as_dict(),
            }
        ),
        files.PREPROCESSING: to_json(
            {**(asdict(preprocessing) if preprocessing else {}), "classes": list(networks.classes)}
        ),
    }
    read = {networks.key_of[variant] for variant in job.chosen if variant.target.takes == "onnx"}
    onnx_files = {key: _file(key, first, ".onnx") for key in lowered if key in read.union(job.precisions)}
    content |= {file: lowered[key].model for key, file in onnx_files.items()}
    if job.bake_preprocessing:
        assert preprocessing is not None
        content[files.IMAGE_MODEL] = with_preprocessing(lowered[first].model, preprocessing)
    engine_files = {variant: _file(variant.precision, first, variant.target.suffix) for variant in engines}
    golden = networks.golden.save()
    documents = {
        files.MANIFEST: networks.manifest
        | {
            "models": {
                key: {**({"file": onnx_files[key]} if key in onnx_files else {}), **low.facts}
                for key, low in lowered.items()
            },
            "targets": [{"target": variant.target.name, "precision": variant.precision} for variant in job.chosen],
            "files": {file: file_entry(data) for file, data in content.items()},
        },
        files.ENGINES: {
            "schema": files.SCHEMA,
            "engines": [entry(engine_files[v], v, engine, networks.model(v)) for v, engine in engines.items()],
            "files": {file: file_entry(data) for file, data in outcome.repository.files.items()},
            "not_served": outcome.repository.left_out,
            **({} if engines else {"note": _why_none(job)}),
        },
        files.VERIFICATION: {
            "float64_max_error": networks.float64_error,
            "tiers": {name: tier.as_dict() for name, tier in outcome.tiers.results.items()},
            "runtimes": outcome.tiers.runtimes,
            "not_run": outcome.tiers.not_run,
            "tuning": networks.tunings,
            **({} if outcome.profile is None else {"profile": outcome.profile}),
            "worst_layers": {name: _worst(errors) for name, errors in networks.layer_errors.items()},
            "machine": machine(),
            "golden": {"file": files.GOLDEN, **file_entry(golden)},
            "seconds": outcome.seconds,
        },
    }
    return {
        **content,
        **{engine_files[variant]: engine.content for variant, engine in engines.items()},
        **outcome.repository.files,
        files.GOLDEN: golden,
        **{name: to_json(document) for name, document in documents.items()},
        files.REPORT: _report(name, content, documents),
    }


def _why_none(job: Job) -> str:
    """Why there is no engine."""
    return "no target asked for takes one" if job.engine else "left out by --no-engine"


def _file(key: str, first: str, suffix: str) -> str:
    """``model<suffix>`` in the first precision asked for, ``model.<precision><suffix>`` in another.

    The key of a target with a form of its own gives ``model.<target>.<precision><suffix>``.
    """
    return f"model{suffix}" if key == first else f"model.{key.replace(' ', '.')}{suffix}"


def _report(name: str, content: Mapping[str, bytes], documents: Mapping[str, Any]) -> bytes:
    """The page for people, from what the other files hold."""
    read = {key: json.loads(content[key]) for key in (files.PASSES, files.PREPROCESSING)}
    page = report_page(
        name,
        documents[files.MANIFEST],
        read[files.PASSES],
        documents[files.VERIFICATION],
        documents[files.ENGINES],
        read[files.PREPROCESSING],
    )
    return page.encode()


def _worst(errors: Mapping[str, float]) -> list[dict[str, Any]]:
    """The layers with the largest errors, the worst first."""
    ranked = sorted(errors.items(), key=lambda item: item[1], reverse=True)
    return [{"layer": name, "error": error} for name, error in ranked[:WORST_LAYERS]]


def _record(record: PassRecord) -> dict[str, Any]:
    """What ``foldgroup explain`` shows of a pass; no times."""
    return {
        "name": record.name,
        "changed": record.changed,
        "rewrites": [asdict(note) for note in record.rewrites],
        "skips": [asdict(note) for note in record.skips],
        "shuffles": [asdict(entry) for entry in record.ledger],
        **({"details": record.details} if record.details else {}),
    }
