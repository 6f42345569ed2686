"""Made the models beside it: one small network, quantized in each way that a device may meet.

python tests/device_agent/models/make.py FOLDER
"""

import sys
from pathlib import Path

import numpy as np
import torch
from ai_edge_quantizer import calibrator, quantizer, recipe, recipe_manager
from ai_edge_quantizer.utils import qsv_utils

from cloud.export import to_tflite

INPUTS, HIDDEN, OUTPUTS = 16, 64, 8


def main(folder: Path) -> None:
    torch.manual_seed(3)
    network = torch.nn.Sequential(torch.nn.Linear(INPUTS, HIDDEN), torch.nn.ReLU(), torch.nn.Linear(HIDDEN, OUTPUTS))
    model = to_tflite(network, (INPUTS,))
    (folder / "float.tflite").write_bytes(model)
    (folder / "static_int8.tflite").write_bytes(quantize(model, recipe.static_wi8_ai8(), calibrate=True))
    (folder / "static_16x8.tflite").write_bytes(quantize(model, recipe.static_wi8_ai16(), calibrate=True))
    (folder / "dynamic_range.tflite").write_bytes(quantize(model, recipe.dynamic_wi8_afp32()))
    (folder / "weight_only.tflite").write_bytes(quantize(model, recipe.weight_only_wi8_afp32()))


def quantize(model: bytes, how: list, *, calibrate: bool = False) -> bytes:
    made = quantizer.Quantizer(model, how)
    if not calibrate:
        return bytes(made.quantize().quantized_model)
    rows = np.random.default_rng(3).normal(size=(256, 1, INPUTS)).astype(np.float32)
    recipes = recipe_manager.RecipeManager()
    recipes.load_quantization_recipe(how)
    seen = calibrator.Calibrator(model, num_threads=1, qsv_update_func=qsv_utils.min_max_update)
    seen.calibrate({"serving_default": [{"args_0": row} for row in rows]}, recipes)
    return bytes(made.quantize(seen.get_model_qsvs()).quantized_model)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
