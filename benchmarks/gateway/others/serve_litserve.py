"""LitServe: batches in one worker for each core, ZeroMQ between its processes."""

import os
import sys
from typing import Annotated

import litserve  # type: ignore[import-not-found]
from fastapi import Body, Response  # type: ignore[import-not-found]

from benchmarks.gateway.http_model import CONTENT_TYPE, HttpModel, Question


class Inference(litserve.LitAPI):  # type: ignore[misc]  # in an environment of its own
    def setup(self, device: str) -> None:
        del device
        self._model = HttpModel()

    # FastAPI hands a body that is not JSON on as it is.
    def decode_request(self, request: Annotated[bytes, Body(media_type=CONTENT_TYPE)]) -> Question:
        return Question(request)

    def batch(self, inputs: list[Question]) -> list[Question]:
        return inputs

    def predict(self, x: list[Question]) -> list[bytes]:
        return self._model.answer(x)

    def unbatch(self, output: list[bytes]) -> list[bytes]:
        return output

    def encode_response(self, output: bytes) -> Response:
        return Response(output, media_type=CONTENT_TYPE)


if __name__ == "__main__":
    server = litserve.LitServer(
        Inference(api_path="/inference", max_batch_size=int(os.environ["BENCH_BATCH"]), batch_timeout=0.001),
        accelerator="cpu",
        workers_per_device=int(os.environ["BENCH_WORKERS"]),
        fast_queue=True,
    )
    server.run(host="127.0.0.1", port=int(sys.argv[1]), log_level="warning", generate_client_file=False)
