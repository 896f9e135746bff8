"""Bundles: the folder a compile writes. Written whole or not at all, read with every hash checked.

====================  =====================================================  ==================
file                  holds                                                  hashed in
====================  =====================================================  ==================
manifest.json         what was built, from what; no times, no machine        –
model.onnx            the folded network, in the first precision asked for   manifest.json
model.int8.onnx, …    the same in the others                                 manifest.json
model.openvino.…      the same with groups packed otherwise for a target     manifest.json
model.image.onnx      model.onnx with preprocessing in front, on request     manifest.json
passes.json           what each pass did and why it left what it left        manifest.json
preprocessing.json    how an image becomes the input; class names            manifest.json
engines.json          the engines and how they were built                    –
model.rtx.plan, …     engines, precisions named as above                     engines.json
triton/               a Triton Inference Server model repository             engines.json
golden.safetensors    inputs and the training form's float64 outputs         verification.json
verification.json     what was measured, and on which machine                –
report.html           all of this for people, on one page                    –
====================  =====================================================  ==================

Equal checkpoints and options give byte-equal files down to preprocessing.json, on processors with vectors of one width
and matrix units alike or with a vector width given; with ``--tune``, equal times; with int8, on one kind of processor
and with one version of the quantiser, which the manifest names. Engine builders are not deterministic and the last bits
of float64 sums depend on the processor, so the other files are outside that promise.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from foldgroup.errors import BundleError, EquivalenceError
from foldgroup.targets import Variant, find_target

SCHEMA = 1
MANIFEST, PASSES, PREPROCESSING = "manifest.json", "passes.json", "preprocessing.json"
IMAGE_MODEL = "model.image.onnx"
ENGINES, GOLDEN, VERIFICATION = "engines.json", "golden.safetensors", "verification.json"
REPORT = "report.html"


def to_json(document: Any) -> bytes:
    """A JSON document as stable text: sorted keys, indented, one newline at the end."""
    return (json.dumps(document, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def file_entry(content: bytes) -> dict[str, Any]:
    """How the manifest names a file's content."""
    return {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk, its JSON documents read and its schema known; open one with :func:`read_bundle`."""

    path: Path
    manifest: dict[str, Any]

    @cached_property
    def passes(self) -> dict[str, Any]:
        """``passes.json``: how the checkpoint was read, and what each pass did."""
        return _read_json(self.path / PASSES, "options", "passes")

    @cached_property
    def preprocessing(self) -> dict[str, Any]:
        """``preprocessing.json``."""
        return _read_json(self.path / PREPROCESSING, "classes")

    @cached_property
    def engines(self) -> dict[str, Any]:
        """``engines.json``."""
        return _read_json(self.path / ENGINES, "engines")

    @cached_property
    def verification(self) -> dict[str, Any]:
        """``verification.json``."""
        return _read_json(self.path / VERIFICATION, "golden")

    @property
    def variants(self) -> tuple[Variant, ...]:
        """Every target in every precision that this bundle was compiled for."""
        return tuple(Variant(find_target(t["target"]), t["precision"]) for t in self._entry("targets"))

    @property
    def models(self) -> Mapping[str, Mapping[str, Any]]:
        """The ONNX files: ``file``, and what was done to get there.

        Keys are precisions, and ``<target> <precision>`` for a target that runs the network in another form.
        """
        models: Mapping[str, Mapping[str, Any]] = self._entry("models")
        if not isinstance(models, dict) or not all(isinstance(entry, dict) for entry in models.values()):
            raise BundleError(f"{self.path / MANIFEST}: its models are no list of files; compile again")
        return models

    def model(self, variant: Variant) -> Mapping[str, Any]:
        """The entry of :attr:`models` that ``variant`` runs, or that its engine was built from if that is kept.

        Raises:
            BundleError: if there is none in its precision.
        """
        found = self.models.get(str(variant)) or self.models.get(variant.precision)
        if found is None:
            precisions = list(dict.fromkeys(precision_of(key) for key in self.models))
            raise BundleError(
                f"{self.path}: has no {variant.precision} model, only {', '.join(precisions)}; compile again "
                f"with --precision {','.join([*precisions, variant.precision])}"
            )
        return found

    def _entry(self, key: str) -> Any:
        if key not in self.manifest:
            raise BundleError(f"{self.path / MANIFEST}: names no {key}, so it is of an older foldgroup; compile again")
        return self.manifest[key]

    def content(self, variant: Variant) -> bytes:
        """The ONNX file or engine that ``variant`` runs; an engine only if its SHA-256 is the one recorded.

        Raises:
            BundleError: if the bundle has none for it.
            EquivalenceError: if the file is not the one that was built.
        """
        if variant.target.takes == "onnx":
            return self.checked(self.model(variant).get("file"), self.manifest["files"])
        entry = self.engine(variant)
        return self.checked(entry["file"], {entry["file"]: entry})

    def engine(self, variant: Variant) -> dict[str, Any]:
        """The entry of a variant's engine in ``engines.json``.

        Raises:
            BundleError: if the bundle has none.
        """
        for entry in self.engines["engines"]:
            if (entry["target"], entry["precision"]) == (variant.target.name, variant.precision):
                found: dict[str, Any] = entry
                return found
        raise BundleError(
            f"{self.path}: has no engine for {variant}; compile again with --target {variant.target.name}"
        )

    def checked(self, name: str | None, recorded: Mapping[str, Any]) -> bytes:
        """The content of the file ``name``, compared with its entry in ``recorded``.

        Raises:
            BundleError: if there is no such entry.
            EquivalenceError: if its SHA-256 is another.
        """
        if not isinstance(name, str) or name not in recorded:
            raise BundleError(f"{self.path}: the file {name!r} is not among those compiled; compile again")
        content = self.read(name)
        if file_entry(content)["sha256"] != recorded[name]["sha256"]:
            raise EquivalenceError(f"{self.path / name}: not the file that was compiled (its SHA-256 differs)")
        return content

    @property
    def fixed_batch(self) -> int | None:
        """The only batch that the network takes; None if it is dynamic."""
        batch = self.manifest["input"]["shape"][0]
        return batch if isinstance(batch, int) else None

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The input's shape without the batch: channels, height and width of an image."""
        _, *shape = self.manifest["input"]["shape"]
        return tuple(shape)

    @property
    def outputs(self) -> Sequence[Mapping[str, Any]]:
        """``name`` and ``shape`` of every output, in order."""
        listed: Sequence[Mapping[str, Any]] = self.manifest.get("outputs") or [self._entry("output")]
        return listed

    @property
    def classes(self) -> int | None:
        """How many classes the network tells apart; None unless its only output is [N, classes]."""
        return classes_of(self.manifest)

    def check_classifier(self) -> None:
        """Refuse to show images to a network that does not classify them.

        Raises:
            BundleError: saying what it takes or gives instead.
        """
        if self.input_shape[:1] != (3,):
            raise BundleError(f"{self.path}: images have 3 channels, the network takes {self.input_shape[0]}")
        if len(self.input_shape) != 3 or self.input_shape[1] != self.input_shape[2]:
            shown = list(self.input_shape)
            raise BundleError(f"{self.path}: images are prepared as [3, S, S], the network takes {shown}")
        if self.classes is None:
            given = ", ".join(f"{output['name']} {output['shape']}" for output in self.outputs)
            raise BundleError(f"{self.path}: the network gives {given}, no logits [N, classes]: it does not classify")

    def read(self, name: str) -> bytes:
        """The content of a file of the bundle.

        Raises:
            BundleError: if it is missing.
        """
        try:
            return (self.path / name).read_bytes()
        except OSError as error:
            raise BundleError(f"{self.path / name}: cannot be read ({error.strerror}); compile again") from error

    def strange_files(self) -> list[str]:
        """The files in its folder that are none of its own, by their path in it."""
        own = {MANIFEST, PASSES, PREPROCESSING, ENGINES, GOLDEN, VERIFICATION, REPORT, *self.manifest["files"]}
        with suppress(BundleError, LookupError, TypeError):  # damaged, so that its engines are strangers, too
            own |= {str(engine["file"]) for engine in self.engines["engines"]} | {*self.engines.get("files", {})}
        found = (entry.relative_to(self.path).as_posix() for entry in self.path.rglob("*") if not entry.is_dir())
        return sorted(name for name in found if name not in own)

    def check_files(self) -> int:
        """Compare every file with the hash recorded for it; returns how many were checked.

        Raises:
            EquivalenceError: naming the first file that is not the one that was written.
        """
        recorded = dict(self.manifest["files"])
        recorded |= {engine["file"]: engine for engine in self.engines["engines"]}
        recorded |= self.engines.get("files", {})
        recorded[GOLDEN] = self.verification["golden"]
        for name in sorted(recorded):
            self.checked(name, recorded)
        return len(recorded)


def precision_of(key: str) -> str:
    """The precision of a model by its key in the manifest."""
    return key.rpartition(" ")[2]


def classes_of(manifest: Mapping[str, Any]) -> int | None:
    """How many classes a manifest's network tells apart; None unless its only output is [N, classes]."""
    shape: Sequence[Any] = manifest["output"]["shape"] if "output" in manifest else ()
    return int(shape[1]) if len(shape) == 2 else None


def default_bundle_name(source: Path) -> str:
    """``<stem>.foldgroup``, where the stem of ``x.pth.tar`` is ``x``."""
    name = source.name
    for suffix in (".pth.tar", ".pt", ".pth", ".safetensors"):
        if name.endswith(suffix):
            return name[: -len(suffix)] + ".foldgroup"
    return source.stem + ".foldgroup"


def read_bundle(path: Path) -> Bundle:
    """Open the bundle at ``path``.

    Raises:
        BundleError: if it is no bundle, or one of another schema.
    """
    bundle = _open(path)
    schema = bundle.manifest["schema"]
    if schema != SCHEMA:
        advice = "use a newer foldgroup" if schema > SCHEMA else "compile again"
        raise BundleError(f"{path}: schema {schema}, this foldgroup reads {SCHEMA}; {advice}")
    return bundle


def _open(path: Path) -> Bundle:
    """The bundle at ``path``, of any schema."""
    if not path.exists():
        raise BundleError(f"{path}: there is no such bundle; make one with 'foldgroup compile CHECKPOINT -o {path}'")
    if not (path / MANIFEST).is_file():
        raise BundleError(f"{path}: not a bundle (no {MANIFEST} in it); make one with 'foldgroup compile CHECKPOINT'")
    manifest = _read_json(path / MANIFEST)
    if not isinstance(manifest.get("files"), dict) or not isinstance(manifest.get("schema"), int):
        raise BundleError(f"{path / MANIFEST}: not a foldgroup manifest; compile again")
    return Bundle(path, manifest)


def check_target(path: Path, *, force: bool, option: str = "-o") -> None:
    """Refuse, before any work, a place where a bundle could not or must not be written; ``option`` is what names it.

    Raises:
        BundleError: if something is there that is no bundle, a bundle without ``force``, or no folder to write in.
    """
    try:
        path.name.encode()
    except UnicodeEncodeError as error:
        raise BundleError(
            f"{path.name!r} is no name for a bundle, as it is no UTF-8; choose another with {option}"
        ) from error
    try:
        if not path.parent.is_dir():
            raise BundleError(f"{path.parent}: there is no such folder; create it or choose another with {option}")
        if not os.access(path.parent, os.W_OK):
            raise BundleError(f"{path.parent}: not writable; choose another place with {option}")
        if not path.exists() and not path.is_symlink():
            return
    except OSError as error:  # too long a name
        raise BundleError(
            f"{path}: cannot be written ({error.strerror}); choose another place with {option}"
        ) from error
    try:
        there = _open(path)
    except BundleError as error:
        raise BundleError(
            f"{path}: exists and is no bundle, so it is left alone; choose another place with {option}"
        ) from error
    if not force:
        raise BundleError(f"{path}: exists; pass --force to replace this bundle, or choose another place with {option}")
    strange = there.strange_files()
    if strange:
        raise BundleError(
            f"{path}: holds {', '.join(strange[:3])}, which no compile wrote and --force would delete: move that, or "
            f"choose another place with {option}"
        )


def write_bundle(path: Path, files: Mapping[str, bytes], *, force: bool = False) -> Bundle:
    """Write ``files`` as the bundle ``path``: all of them or, if anything goes wrong, none, and what was there stays.

    The files are written to a hidden folder beside ``path``, which then takes its name in one step.

    Raises:
        BundleError: as :func:`check_target`, or if the disk refuses.
    """
    check_target(path, force=force)
    try:
        staging = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            for name, content in files.items():
                (staging / name).parent.mkdir(parents=True, exist_ok=True)
                with (staging / name).open("wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
            staging.chmod(0o755)
            _take_name(staging, path)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        raise BundleError(f"{path}: cannot be written ({error.strerror or error}); nothing was changed") from error
    return read_bundle(path)


def _take_name(staging: Path, path: Path) -> None:
    """Move ``staging`` to ``path``; a bundle that is there is set aside until that has worked."""
    if not path.exists():
        staging.rename(path)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    path.rename(aside / path.name)
    try:
        staging.rename(path)
    except BaseException:
        (aside / path.name).rename(path)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _read_json(path: Path, *keys: str) -> dict[str, Any]:
    """The JSON object at ``path``, which has all of ``keys``."""
    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise BundleError(f"{path}: cannot be read ({error.strerror}); compile again") from error
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path}: not JSON ({error}); compile again") from error
    if not isinstance(document, dict):
        raise BundleError(f"{path}: not a JSON object; compile again")
    for key in keys:
        if key not in document:
            raise BundleError(f"{path}: names no {key}; compile again")
    return document
