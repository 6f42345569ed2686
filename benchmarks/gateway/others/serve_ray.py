"""Ray Serve: a replica for each core, batches inside a replica."""

import os
import signal
import sys

from ray import serve  # type: ignore[import-not-found]
from starlette.requests import Request  # type: ignore[import-not-found]
from starlette.responses import Response  # type: ignore[import-not-found]

from benchmarks.gateway.http_model import CONTENT_TYPE, HttpModel, Question


@serve.deployment(
    num_replicas=int(os.environ["BENCH_WORKERS"]),
    max_ongoing_requests=64,
    ray_actor_options={"num_cpus": 0.5},
    logging_config={"enable_access_log": False},
)
class Inference:
    def __init__(self) -> None:
        self._model = HttpModel()

    @serve.batch(max_batch_size=int(os.environ["BENCH_BATCH"]), batch_wait_timeout_s=0.001)  # type: ignore[untyped-decorator]
    async def _infer(self, questions: list[Question]) -> list[bytes]:
        return self._model.answer(questions)

    async def __call__(self, request: Request) -> Response:
        return Response(await self._infer(Question(await request.body())), media_type=CONTENT_TYPE)


if __name__ == "__main__":
    serve.start(
        http_options={"host": "127.0.0.1", "port": int(sys.argv[1])}, logging_config={"enable_access_log": False}
    )
    serve.run(Inference.bind(), route_prefix="/inference")  # type: ignore[attr-defined]  # the decorator adds it
    print("ready", flush=True)
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    serve.shutdown()
