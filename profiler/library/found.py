"""Which class of the installed Transformers runs a configuration, and the configuration as that class takes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from db.errors import UserError

LEAST_VERSION = (5, 23)  # whose configurations tell of each layer, and whose loading takes parts of a model
_LEFT_OUT = ("quantization_config", "auto_map", "transformers_version", "torch_dtype", "dtype")


@dataclass(frozen=True, slots=True)
class Found:
    """A class of Transformers, its configuration, and the part of it that describes the text decoder."""

    model_class: Any
    config: Any
    text: Any

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return int(self.text.num_hidden_layers)


def find(config: Mapping[str, Any]) -> Found:
    """The class that the configuration names; raises `UserError` where the library has none, or takes it badly."""
    import transformers
    from transformers.utils import logging

    if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < LEAST_VERSION:
        least = ".".join(map(str, LEAST_VERSION))
        raise UserError("transformers", transformers.__version__, f"must be {least} or later where it runs layers")
    named = config.get("architectures")
    architecture = str(named[0] if isinstance(named, list) and named else named)
    model_class = _class_of(architecture, str(config.get("model_type")))
    if model_class is None:
        allowed = f"is no decoder of Transformers {transformers.__version__}, nor one with kernels here"
        raise UserError("architectures", architecture, allowed)
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        plain = {name: value for name, value in config.items() if name not in _LEFT_OUT}
        kind = model_class.config_class
        made = kind.from_dict(kind._decode_special_floats(plain))  # infinity, which JSON lacks
        text = made.get_text_config(decoder=True)
    except Exception as error:  # whatever the library says of a value that it cannot take
        reason = " ".join(str(error).split())[:200]
        raise UserError("config.json", architecture, f"is not taken by Transformers: {reason}") from error
    finally:
        logging.set_verbosity(level)
    if getattr(made, "is_encoder_decoder", False) or not isinstance(getattr(text, "num_hidden_layers", None), int):
        raise UserError("architectures", architecture, "has no decoder of text alone")
    return Found(model_class=model_class, config=made, text=text)


def _class_of(architecture: str, model_type: str) -> Any:
    """The class of that name, however it is cased; else the one of that model type; None where there is none."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    alike = {name.lower().replace("_", ""): name for name in dir(transformers) if "For" in name}
    name = architecture if architecture in dir(transformers) else alike.get(architecture.lower().replace("_", ""))
    found = getattr(transformers, name, None) if name else None
    if found is None and model_type in CONFIG_MAPPING:
        kind = CONFIG_MAPPING[model_type]
        for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING):
            if found is None and kind in mapping:
                found = mapping[kind]
    return found if hasattr(found, "config_class") and hasattr(found, "_from_config") else None
