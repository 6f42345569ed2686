"""A released model as a teacher, and the rows that show how good it is."""

import hashlib
from pathlib import Path

from cloud.gate import load_runner
from cloud.pipelines.command import load_model_pipeline
from cloud.pipelines.deploy import newest_release
from cloud.release_store import ReleaseStore
from cloud.sample_store import TrainingStore
from cloud.settings import CloudSettings
from cloud.tasks import load_task
from cloud.tasks.base import LabelledSamples, Task
from cloud.teacher import Teacher
from shoal.errors import ConfigError, ModelError
from shoal.v1 import release_pb2 as pb
from shoal.v1.command_pb2 import LABEL_SOURCE_PERSON, LABEL_SOURCE_WITH_SAMPLE

_FORMATS = {".onnx": pb.MODEL_FORMAT_ONNX, ".tflite": pb.MODEL_FORMAT_TFLITE}
# A teacher that was measured by teachers' words would find itself always right.
_TRUSTED = frozenset({LABEL_SOURCE_PERSON, LABEL_SOURCE_WITH_SAMPLE})
_SHORT_DIGEST = 12


def load_model_task(settings: CloudSettings, model: str) -> Task | None:
    """The task that makes a model; None where no pipeline file does.

    Raises:
        ConfigError: there is no such model, or its pipeline or task cannot be loaded.
    """
    found = settings.model(model)
    if found is None:
        raise ConfigError(f"no model {model!r}, expected one of {[known.name for known in settings.models]}")
    if not found.pipeline:
        return None
    pipeline = load_model_pipeline(found)
    return load_task(pipeline.task, pipeline.model, pipeline.parameters, Path(found.pipeline).parent)


def load_teacher(settings: CloudSettings, model: str, artefact: Path | None = None) -> Teacher:
    """The gateway's model of the newest release, or a larger one that takes the same input.

    Raises:
        ConfigError: there is no release, or the file is not there or of no known kind.
        ModelError: the release does not classify, or its runtime refuses the model.
    """
    released = newest_release(ReleaseStore(settings.releases_dir), model)
    if released is None:
        raise ConfigError(f"{model} has no release to learn from")
    if released.spec.score != pb.SCORE_KIND_UNCERTAINTY:
        raise ModelError(f"release {released.spec.release} of {model} does not classify, so it cannot label")
    if artefact is None:
        item = next((item for item in released.spec.artefacts if item.tier == pb.TIER_GATEWAY), None)
        if item is None:
            raise ModelError(f"release {released.spec.release} of {model} has nothing for gateways")
        runner = load_runner(released.files[item.path], item.format)
        return Teacher(f"{model} {released.spec.release}", [runner], released.spec.input)
    try:
        content = artefact.read_bytes()
    except OSError as exc:
        raise ConfigError(f"{artefact}: {exc.strerror}") from exc
    if artefact.suffix not in _FORMATS:
        raise ConfigError(f"{artefact}: expected one of {sorted(_FORMATS)}")
    name = f"{artefact.stem} {hashlib.sha256(content).hexdigest()[:_SHORT_DIGEST]}"
    return Teacher(name, [load_runner(content, _FORMATS[artefact.suffix])], released.spec.input)


def held_out(task: Task, store: TrainingStore) -> LabelledSamples:
    """Rows that no release was trained on, with labels that are no teacher's."""
    extra = store.labelled(task.model, task.shape, task.classes, sources=_TRUSTED)
    return task.prepare(extra).holdout
