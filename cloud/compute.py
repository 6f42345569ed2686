"""What people may ask of the machine that trains; resolved in `cloud.hardware`, which needs torch."""

from enum import StrEnum, unique


@unique
class Device(StrEnum):
    """AUTO is the GPU where there is one."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


@unique
class Precision(StrEnum):
    """AUTO is bfloat16 with channels last on a GPU, and float32 on a CPU, where weights are the same to the bit."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
