"""Which models both servers run, and how they are asked. `build_models.py` makes them."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BenchModel:
    """One model.

    Attributes:
        batch: rows of one call at most, for the gateway and for onnxruntime alone.
        paced_rps: a rate that every contender keeps up with, at which latency is compared; 0 where there is none.
    """

    name: str
    shape: tuple[int, ...]
    batch: int
    paced_rps: int


MODELS = {
    model.name: model
    for model in (
        BenchModel("mlp", (3072,), batch=32, paced_rps=1000),
        BenchModel("cnn", (8, 8, 1), batch=32, paced_rps=1000),
        BenchModel("resnet18", (224, 224, 3), batch=8, paced_rps=0),
    )
}
