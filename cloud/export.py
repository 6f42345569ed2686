"""From a torch module to float ONNX, float TFLite and dynamic int8 TorchScript, in memory; rows as the task says."""

import contextlib
import io
import logging
import re
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


def to_torch_dynamic(model: nn.Module, shape: tuple[int, ...]) -> bytes:
    """Export with int8 linear layers for users of torch on a CPU: `torch.jit.load` runs it at any batch, without Shoal.

    Weights are int8; activations are quantized anew in each call, so nothing is calibrated. Convolutions stay float,
    small layers get slower, and no gateway or device can run it: the quantized layers have no ONNX or TFLite. Torch
    calls both the layers and the format deprecated, so it ships beside the artefacts, never instead.

    Raises:
        ModelError: the module has no linear layer, or cannot be traced.
    """
    if not any(type(layer) is nn.Linear for layer in model.modules()):
        raise ModelError("cannot quantize dynamically: the module has no linear layer")
    file = io.BytesIO()
    try:
        with warnings.catch_warnings():
            for said in ("torch.ao.quantization is deprecated", "`torch.jit.", "torch.quantize_per_tensor"):
                warnings.filterwarnings("ignore", re.escape(said))
            quantized = torch.ao.quantization.quantize_dynamic(model.eval(), {nn.Linear})  # type: ignore[no-untyped-call]
            example = torch.zeros(_EXAMPLE_BATCH, *shape)
            traced = torch.jit.trace(quantized.requires_grad_(False), example)  # type: ignore[no-untyped-call]
            torch.jit.save(traced, file)
    except RuntimeError as exc:
        raise ModelError(f"cannot export to TorchScript: {exc}") from exc
    return file.getvalue()


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
