"""What work a vision-language model does, and how long a device takes.

>>> from costmodel import Image, Workload, predict
>>> request = Workload(images=[Image(1920, 1080)], text_tokens=64, output_tokens=128)
>>> prediction = predict("qwen2.5-vl-7b", "h100-sxm5-80gb", request)
>>> prediction.tokens["visual"]
2691
"""

from costmodel.catalogue import load_model, model_names
from costmodel.deployment import Parallelism, Precision
from costmodel.engine import engine_names, load_engine
from costmodel.errors import DoesNotFit, Unsupported
from costmodel.hardware import hardware_names, load_hardware
from costmodel.predict import Prediction, evaluate, predict
from costmodel.query import build_query
from costmodel.techniques import compose, technique
from costmodel.workload import Image, Video, Workload

__all__ = [
    "DoesNotFit",
    "Image",
    "Parallelism",
    "Precision",
    "Prediction",
    "Unsupported",
    "Video",
    "Workload",
    "build_query",
    "compose",
    "engine_names",
    "evaluate",
    "hardware_names",
    "load_engine",
    "load_hardware",
    "load_model",
    "model_names",
    "predict",
    "technique",
]
