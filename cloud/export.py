"""From a torch module to float ONNX and float TFLite, in memory. Both take rows laid out as the task says."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

import litert_torch
import onnx
import torch
from torch import nn

from shoal.errors import ModelError

# Any batch but 0 and 1, which torch.export would take for constants.
_EXAMPLE_BATCH = 2


def to_onnx(model: nn.Module, shape: tuple[int, ...]) -> bytes:
    """Export with a free batch dimension, tensors named `input` and `output`.

    The same weights give the same bytes: source paths, stack traces and other notes of the exporter are stripped.

    Raises:
        ModelError: the exporter does not know an operation of the module.
    """
    batch = {0: torch.export.Dim("batch", min=1)}
    try:
        with _quiet():
            program = torch.onnx.export(
                model.eval(),
                (torch.zeros(_EXAMPLE_BATCH, *shape),),
                dynamo=True,
                dynamic_shapes=(batch,),
                external_data=False,
                input_names=["input"],
                output_names=["output"],
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as exc:
        raise ModelError(f"cannot export to ONNX: {exc}") from exc
    if program is None:
        raise RuntimeError("torch.onnx.export returned no program, though dynamo=True promises one")
    return _strip(program.model_proto).SerializeToString(deterministic=True)


def to_tflite(model: nn.Module, shape: tuple[int, ...]) -> bytes:
    """Export with batch 1, the device's.

    Raises:
        ModelError: the converter does not know an operation of the module.
    """
    try:
        with _quiet():
            return bytes(litert_torch.convert(model.eval(), (torch.zeros(1, *shape),)).model_content())
    except RuntimeError as exc:
        raise ModelError(f"cannot export to TFLite: {exc}") from exc


def _strip(proto: onnx.ModelProto) -> onnx.ModelProto:
    graph = proto.graph
    for part in (proto, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        part.ClearField("metadata_props")
    return proto


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporters' progress off the terminal; what goes wrong they raise."""
    exporter_log = logging.getLogger("torch.onnx")
    level = exporter_log.level
    exporter_log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            # torch.export pickles its own deprecated class.
            warnings.filterwarnings("ignore", "`isinstance\\(treespec, LeafSpec\\)` is deprecated", FutureWarning)
            yield
    finally:
        exporter_log.setLevel(level)
