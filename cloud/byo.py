"""Bring your own model: a `.tflite` or `.onnx` file that somebody else made becomes a release.

What a release needs is derived from the file, or the file is refused with the exact reason. Only a child process loads
it, under the limits of a node's self-test: what fails here would fail there.
"""

import datetime as dt
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from cloud.byo_probe import Facts
from cloud.keys import KeyStore
from cloud.release_orders import plans_of, submit_plan, submit_release
from cloud.release_store import ReleaseStore
from cloud.repository import ROLLOUT
from cloud.retained import RETAINED_BUDGET_BYTES
from shoal.errors import ConfigError, ModelError
from shoal.input_schema import check_input_schema
from shoal.release.plan import PERMILLE
from shoal.release.probation import measure_baseline
from shoal.release.selftest import Limits
from shoal.release.trust import model_role
from shoal.scoring import score_rows
from shoal.tensors import to_tensor
from shoal.v1 import release_pb2 as pb

# What nodes accept by default, see `shoal.release.offer.NodeModel`.
MAX_FILE_BYTES = 64 << 20

_FORMATS = {
    ".tflite": (pb.TIER_DEVICE, pb.MODEL_FORMAT_TFLITE),
    ".onnx": (pb.TIER_GATEWAY, pb.MODEL_FORMAT_ONNX),
}
RESIZES = MappingProxyType({"area": pb.RESIZE_AREA, "nearest": pb.RESIZE_NEAREST})
_GOLDEN_ROWS = 8
# A release spec travels as one message of at most 1 MiB; the rest is digests and names.
_GOLDEN_BYTES = 960 << 10
# Of the largest output: what float32 sums differ by when added in another order, with room.
_FLOAT_SHARE = 1e-4
# Kernels of one runtime round a quantized output this differently, with room; see `docs/models.md`.
_QUANTIZED_STEPS = 4
_STEPS_IN_SPAN = 255
_STDERR_BYTES = 4096
# Never exceeded: scores of uncertainty stay below 1, and no finite error is larger.
_NEVER = {pb.SCORE_KIND_UNCERTAINTY: 1.0, pb.SCORE_KIND_RECONSTRUCTION: float(np.finfo(np.float32).max)}

Rows = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Golden:
    """Golden vectors that came with a model.

    Attributes:
        inputs: (n, *shape).
        outputs: (n, *output shape), or None: whatever the model answers here.
        tolerance: in output units, or None: derived.
    """

    inputs: Rows
    outputs: Rows | None = None
    tolerance: float | None = None


@dataclass(frozen=True, slots=True)
class Preparation:
    """How a node makes the model's inputs of readings.

    Attributes:
        window: readings in a row that make one input.
        stride: readings from the start of one window to that of the next; 0: the window's own length.
        resize: "area" or "nearest": readings are pictures, brought to the model's size.
        mean, std: subtracted and divided by; one number, or one for each channel.
    """

    window: int = 1
    stride: int = 0
    resize: str | None = None
    mean: Sequence[float] = (0.0,)
    std: Sequence[float] = (1.0,)

    def schema(self, shape: tuple[int, ...]) -> pb.InputSchema:
        """The release's words for it.

        Raises:
            ModelError: the model's input cannot be made that way.
        """
        schema = pb.InputSchema(
            shape=shape,
            mean=self.mean,
            std=self.std,
            window=self.window if self.window > 1 else 0,
            stride=self.stride,
            resize=RESIZES[self.resize] if self.resize else pb.RESIZE_UNSPECIFIED,
        )
        check_input_schema(schema)
        channels = shape[-1] if shape else 1
        if not len(self.mean) == len(self.std) or len(self.mean) not in (1, channels):
            raise ModelError(f"{len(self.mean)} means and {len(self.std)} deviations, expected 1 or {channels} of each")
        return schema


@dataclass(frozen=True, slots=True)
class Described:
    """A file as it was read, and what its release says of it; model and number are still open."""

    data: bytes
    spec: pb.ReleaseSpec


def load_golden(path: Path) -> Golden:
    """Read an NPZ file with `inputs`, and perhaps `outputs` and `tolerance`.

    Raises:
        ConfigError: it is no such file.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            inputs = np.asarray(arrays["inputs"], dtype=np.float32)
            outputs = np.asarray(arrays["outputs"], dtype=np.float32) if "outputs" in arrays else None
            tolerance = float(arrays["tolerance"]) if "tolerance" in arrays else None
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise ConfigError(f"{path} holds no golden vectors (an NPZ with `inputs`): {exc}") from exc
    if inputs.ndim < 2 or not len(inputs) or (outputs is not None and len(outputs) != len(inputs)):  # noqa: PLR2004
        shapes = f"inputs {list(inputs.shape)}" + (f" and outputs {list(outputs.shape)}" if outputs is not None else "")
        raise ConfigError(f"{path}: {shapes}, expected (n, ...) of both")
    if tolerance is not None and not 0 <= tolerance < float("inf"):
        raise ConfigError(f"{path}: tolerance {tolerance}, expected a finite one, 0 or above")
    return Golden(inputs, outputs, tolerance)


def describe(
    path: Path,
    golden: Golden | None = None,
    threshold: float | None = None,
    preparation: Preparation | None = None,
) -> Described:
    """Derive what a release says of a file: one artefact, for devices from TFLite and for gateways from ONNX.

    Args:
        path: the file.
        golden: what it must answer; by default what it answers here to random inputs.
        threshold: a row whose score exceeds it asks the next layer; by default none does.
        preparation: how readings become inputs; by default each goes in as it is.

    Raises:
        ModelError: it cannot be released; the message says why.
        ConfigError: there is no such file.
    """
    preparation = preparation or Preparation()
    data = _read(path)
    tier, model_format = _FORMATS[path.suffix]
    facts, rows, outputs, plainly = _probe(path.name, data, golden)
    kind = score_kind(facts.shape, outputs.shape[1:])
    vectors = _derived(facts, rows, outputs, plainly) if golden is None else _given(golden, facts, outputs, plainly)
    artefact = pb.Artefact(
        tier=tier,
        format=model_format,
        int8=facts.int8,
        golden=vectors,
        threshold=_NEVER[kind] if threshold is None else threshold,
        # Random rows say nothing of live ones; rows that were given do, the more the better.
        baseline=measure_baseline([] if golden is None else score_rows(kind, rows, outputs).scores.tolist()),
    )
    schema = preparation.schema(facts.shape)
    return Described(data, pb.ReleaseSpec(input=schema, score=kind, artefacts=[artefact]))


def publish(
    store: ReleaseStore,
    keys: KeyStore,
    described: Described,
    *,
    model: str,
    targets: Sequence[str],
    budget_bytes: int = RETAINED_BUDGET_BYTES,
) -> pb.ReleaseSpec:
    """Sign and queue a described file as the model's next release, with the plan that brings it to `targets`.

    Raises:
        ConfigError: the model has no role, or a key is missing.
        ModelError: it cannot be released, or there is no room for it within `budget_bytes` of retained messages.
    """
    now = dt.datetime.now(dt.UTC)
    newest = store.newest()
    if model_role(model) not in newest.roles:
        raise ConfigError(f"model {model!r} has no role: `shoal keys add-model {model}` makes one")
    keys.signers(ROLLOUT)  # before the release is queued: without a plan nobody would run it
    spec = pb.ReleaseSpec()
    spec.CopyFrom(described.spec)
    spec.model = model
    plans = plans_of(newest.roles[ROLLOUT], newest.file)
    spec.parent = next((plan.release for plan in plans if plan.model == model), 0)
    released = submit_release(store, spec, [described.data], keys, now, budget_bytes=budget_bytes)
    plan = pb.RolloutPlan(
        rollout_id=f"{model}-{released.release}",
        model=model,
        release=released.release,
        targets=targets,
        share_permille=PERMILLE,
    )
    submit_plan(store, plan, keys, now)
    return released


def score_kind(shape: tuple[int, ...], output_shape: tuple[int, ...]) -> pb.ScoreKind:
    """Choose how a row's output becomes its score.

    Raises:
        ModelError: neither way fits.
    """
    if output_shape == shape:
        return pb.SCORE_KIND_RECONSTRUCTION
    classes = [size for size in output_shape if size != 1]
    if len(classes) == 1:
        return pb.SCORE_KIND_UNCERTAINTY
    what = "one value" if not classes else f"{list(output_shape)}"
    raise ModelError(
        f"a row of {list(shape)} is answered with {what}, which gives no score: expected its own shape again "
        "(a reconstruction) or one row of classes"
    )


def _read(path: Path) -> bytes:
    if path.suffix not in _FORMATS:
        raise ModelError(f"{path.name}: expected a name that ends in {' or '.join(_FORMATS)}")
    try:
        size = path.stat().st_size
        if not 0 < size <= MAX_FILE_BYTES:
            raise ModelError(f"{path.name}: {size} bytes, expected 1 to {MAX_FILE_BYTES}")
        return path.read_bytes()
    except OSError as exc:
        raise ConfigError(f"{path}: {exc.strerror}") from exc


def _probe(name: str, data: bytes, golden: Golden | None) -> tuple[Facts, Rows, Rows, Rows]:
    """Run a file in a child; return what it is, the inputs and both answers to them."""
    limits = Limits()
    with tempfile.TemporaryDirectory(prefix="shoal-byo-") as folder, tempfile.TemporaryFile() as stderr:
        workdir = Path(folder)
        path = workdir / f"model{Path(name).suffix}"
        path.write_bytes(data)
        if golden is not None:
            np.save(workdir / "given.npy", golden.inputs)
        arguments = [str(path), folder, str(limits.memory_bytes), str(limits.cpu_s)]
        try:
            done = subprocess.run(  # noqa: S603  our own interpreter and module
                [sys.executable, "-m", "cloud.byo_probe", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=stderr,
                stderr=stderr,
                timeout=limits.wall_s,
                check=False,
            )
        except subprocess.TimeoutExpired as exc:
            raise ModelError(f"{name}: no answer within {limits.wall_s:g} s") from exc
        if not (workdir / "probe.json").exists():
            stderr.seek(0)
            raise ModelError(f"{name}: {_last_words(done.returncode, stderr.read(), limits)}")
        found = json.loads((workdir / "probe.json").read_text())
        if "error" in found:
            raise ModelError(f"{name}: {found['error']}")
        facts = Facts(**{**found["facts"], "shape": tuple(found["facts"]["shape"])})
        with np.load(workdir / "probe.npz", allow_pickle=False) as arrays:
            return facts, arrays["rows"], arrays["outputs"], arrays["plainly"]


def _last_words(code: int, output: bytes, limits: Limits) -> str:
    lines = output[-_STDERR_BYTES:].decode(errors="replace").strip().splitlines()
    said = next((line for line in reversed(lines) if not line.startswith(("INFO", "W0000"))), "it said nothing")
    ended = f"signal {-code}" if code < 0 else f"status {code}"
    return (
        f"the process that ran it ended with {ended}: {said} (a self-test on a node may take "
        f"{limits.memory_bytes >> 20} MiB and {limits.cpu_s} s)"
    )


def _derived(facts: Facts, rows: Rows, outputs: Rows, plainly: Rows) -> pb.GoldenVectors:
    """Keep the rows least in dispute: on others, a rounding decides which class a quantized model answers."""
    count = min(_GOLDEN_ROWS, _GOLDEN_BYTES // (rows[0].nbytes + outputs[0].nbytes))
    if not count:
        raise ModelError(f"one golden vector is {rows[0].nbytes + outputs[0].nbytes} bytes, at most {_GOLDEN_BYTES}")
    apart = _apart(outputs, plainly)
    usable = [index for index in np.argsort(apart, kind="stable") if np.isfinite(outputs[index]).all()]
    if not usable:
        tried = f"{len(rows)} random inputs from {facts.low:g} to {facts.high:g}"
        raise ModelError(f"no output is finite for {tried}: give golden vectors")
    chosen = usable[:count]
    tolerance = max(_tolerance(facts, outputs), 2 * float(apart[chosen].max()))
    return pb.GoldenVectors(inputs=to_tensor(rows[chosen]), outputs=to_tensor(outputs[chosen]), tolerance=tolerance)


def _given(golden: Golden, facts: Facts, outputs: Rows, plainly: Rows) -> pb.GoldenVectors:
    wanted = outputs if golden.outputs is None else golden.outputs
    if wanted.shape != outputs.shape:
        raise ModelError(f"golden outputs are {list(wanted.shape)}, the model answers {list(outputs.shape)}")
    size = golden.inputs.nbytes + wanted.nbytes
    if size > _GOLDEN_BYTES:
        raise ModelError(f"{len(wanted)} golden vectors are {size} bytes, at most {_GOLDEN_BYTES}: use fewer")
    tolerance = golden.tolerance
    if tolerance is None:
        tolerance = max(_tolerance(facts, wanted), 2 * float(_apart(outputs, plainly).max()))
    for index, worst in enumerate(_apart(outputs, wanted).tolist()):
        # NaN compares false with everything, so ask what is right and not what is wrong.
        if not worst <= tolerance:
            raise ModelError(f"golden vector {index}: off by {worst:g}, at most {tolerance:g}")
    return pb.GoldenVectors(inputs=to_tensor(golden.inputs), outputs=to_tensor(wanted), tolerance=tolerance)


def _apart(some: Rows, others: Rows) -> Rows:
    """The largest difference in each row."""
    with np.errstate(invalid="ignore", over="ignore"):
        return np.asarray(np.abs(some - others).reshape(len(some), -1).max(axis=1))


def _tolerance(facts: Facts, outputs: Rows) -> float:
    """How far a correct runtime may be off, in output units."""
    finite = outputs[np.isfinite(outputs)]
    if not finite.size:
        return 0.0
    rounding = _FLOAT_SHARE * max(1.0, float(np.abs(finite).max()))
    if not facts.int8:
        return rounding
    step = facts.output_step or float(np.ptp(finite)) / _STEPS_IN_SPAN
    return max(rounding, _QUANTIZED_STEPS * step)
