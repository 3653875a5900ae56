"""Every architecture that kernels here run, by the name that configurations have for it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from profiler.model.architectures.architecture import Architecture
from profiler.model.architectures.gemma import GEMMA
from profiler.model.architectures.glm import GLM
from profiler.model.architectures.latent import LATENT
from profiler.model.architectures.llama import LLAMA
from profiler.model.architectures.mixture import MIXTURES

ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType({**LLAMA, **GEMMA, **GLM, **MIXTURES, **LATENT})
