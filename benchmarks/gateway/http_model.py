"""What every HTTP server here does with a request: the gateway's work, without most of its checks.

Needs numpy, onnxruntime and protobuf, which each server's own environment has; and the generated messages.
"""

import os
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from shoal.v1 import inference_pb2 as pb

CONTENT_TYPE = "application/x-protobuf"


class Question:
    """One request, unpacked: `values` is float32 of the model's shape."""

    __slots__ = ("request", "values")

    def __init__(self, payload: bytes) -> None:
        self.request = pb.InferenceRequest.FromString(payload)
        tensor = self.request.rows[0].reading.tensor
        self.values = np.frombuffer(tensor.data, np.uint8).reshape(tuple(tensor.shape)).astype(np.float32)


class HttpModel:
    """One onnxruntime session."""

    def __init__(self) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(os.environ.get("BENCH_THREADS", "1"))
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        path = os.environ["BENCH_MODEL"]
        self._session: Any = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def answer(self, questions: list[Question]) -> list[bytes]:
        """One model call for all questions; a serialized reply for each."""
        inputs = np.stack([question.values for question in questions])
        logits = self._session.run(None, {"input": inputs})[0]
        return [
            _reply(question.request, score, label)
            for question, score, label in zip(questions, _uncertainty(logits), logits.argmax(axis=1), strict=True)
        ]


def _uncertainty(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    result: NDArray[np.float32] = 1 - shifted.max(axis=1) / shifted.sum(axis=1)
    return result


def _reply(request: pb.InferenceRequest, score: np.float32, label: np.int64) -> bytes:
    answer = pb.Answer(release=1, score=float(score), label=int(label))
    row = pb.RowReply(seq=request.rows[0].reading.seq, status=pb.STATUS_OK, answer=answer)
    return pb.InferenceReply(epoch=request.epoch, model=request.model, rows=[row]).SerializeToString()
