"""What a model is, without running it: its layers, the formats of its numbers, and what follows from both.

Configurations come in through `configuration`, and nothing here imports torch before a dtype is asked for.
"""

from profiler.model.bundled import bundled_names, load_model_shape
from profiler.model.configuration import model_from_config
from profiler.model.precision import PRECISIONS, Precision, precision_of
from profiler.model.shape import Backend, ModelShape
from profiler.model.spec import LayerSpec
from profiler.model.whole.layer import WholeLayer

__all__ = [
    "PRECISIONS",
    "Backend",
    "LayerSpec",
    "ModelShape",
    "Precision",
    "WholeLayer",
    "bundled_names",
    "load_model_shape",
    "model_from_config",
    "precision_of",
]
