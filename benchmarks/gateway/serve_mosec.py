"""mosec: protobuf in, protobuf out. Run in mosec's own environment; settings come as BENCH_* variables."""

import os
from typing import Any

from mosec import Server, Worker  # type: ignore[import-not-found]  # in an environment of its own

from benchmarks.gateway.http_model import CONTENT_TYPE, HttpModel, Question


class Inference(Worker):  # type: ignore[misc]  # as above
    """One session in each worker process."""

    resp_mime_type = CONTENT_TYPE

    def __init__(self) -> None:
        self._model = HttpModel()

    def deserialize(self, data: bytes) -> Question:
        return Question(data)

    def forward(self, data: Any) -> Any:  # mosec makes a schema of what is said here, and of a union cannot
        return self._model.answer(data) if isinstance(data, list) else self._model.answer([data])[0]

    def serialize(self, data: bytes) -> bytes:
        return data


if __name__ == "__main__":
    server = Server()
    server.append_worker(
        Inference,
        num=int(os.environ["BENCH_WORKERS"]),
        max_batch_size=int(os.environ["BENCH_BATCH"]),
        max_wait_time=int(os.environ["BENCH_WAIT_MS"]),
    )
    server.run()
