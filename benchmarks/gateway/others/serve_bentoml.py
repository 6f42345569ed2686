"""BentoML: its own API types take JSON and files, so requests come through its ASGI door, a call to the model each."""

import os

import bentoml  # type: ignore[import-not-found]
from starlette.applications import Starlette  # type: ignore[import-not-found]
from starlette.requests import Request  # type: ignore[import-not-found]
from starlette.responses import Response  # type: ignore[import-not-found]
from starlette.routing import Route  # type: ignore[import-not-found]

from benchmarks.gateway.http_model import CONTENT_TYPE, HttpModel, Question

_models: list[HttpModel] = []


async def infer(request: Request) -> Response:
    return Response(_models[0].answer([Question(await request.body())])[0], media_type=CONTENT_TYPE)


@bentoml.service(workers=int(os.environ["BENCH_WORKERS"]), logging={"access": {"enabled": False}})
@bentoml.asgi_app(Starlette(routes=[Route("/inference", infer, methods=["POST"])]))
class Inference:
    def __init__(self) -> None:
        _models.append(HttpModel())
