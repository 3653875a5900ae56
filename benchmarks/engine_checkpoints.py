"""Holds written quantized checkpoints against an engine's own loader: its configuration class, schemes and parameters.

    pip download --no-deps -d wheels vllm==0.33.0; python -m zipfile -e wheels/vllm-*.whl unpacked
    pip install --no-deps --target imports compressed-tensors==0.17.0 ...  # what its modules import, one by one
    python -m benchmarks.engine_checkpoints vllm unpacked imports
    python -m benchmarks.engine_checkpoints sglang unpacked imports

A small model is quantized to every precision. The engine's `CompressedTensorsConfig` reads `quantization_config`, names
the scheme of each linear as on a card of capability 9.0, and the scheme makes the parameters that its loader fills:
names, shapes and kinds of numbers are compared with the tensors written. Its kernels, which need a card, are not made:
packages of kernels stand empty. Prints a row a precision; exit code 1 if one does not fit.
"""

from __future__ import annotations

import json
import os
import pkgutil
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock, patch

import torch
from safetensors import safe_open

from benchmarks.demo_model import SMALL, write_demo_model
from service.cli.output import print_table
from service.use_cases.checkpoints.quantize import QuantizeOptions, quantize

_VARIANTS: dict[str, dict[str, Any]] = {
    "w8a16": {},
    "w8a16, groups of 64": {"group_size": 64},
    "w8a8": {},
    "w8a8-static": {},
    "w8a8-static, asymmetric": {"asymmetric": True},
    "fp8": {},
    "fp8-static": {},
    "fp8, KV in e4m3": {"kv": "fp8"},
}
_PACKED = 4  # 8-bit weights in an int32
_OF_AN_ENGINE = (
    "init_int8_linear_kernel", "init_fp8_linear_kernel", "init_wfp8_a16_linear_kernel", "choose_mp_linear_kernel",
    "get_current_vllm_config",
)  # fmt: skip
"""What schemes ask for that only an engine on a card has: kernels, and the model's 16-bit format."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """Where an engine keeps what reads such checkpoints."""

    room: str  # of its configuration class
    parameters: str
    scheme_of: str  # the method that names a linear's scheme
    kernels: tuple[str, ...] = ()  # packages of kernels and pictures that it imports and nothing here needs


_ENGINES = {
    "vllm": Engine(
        room="vllm.model_executor.layers.quantization.compressed_tensors", parameters="vllm.model_executor.parameter",
        scheme_of="get_scheme",
    ),
    "sglang": Engine(
        room="sglang.srt.layers.quantization.compressed_tensors", parameters="sglang.srt.layers.parameter",
        scheme_of="get_linear_scheme", kernels=("sgl_kernel", "flashinfer", "torchvision"),
    ),
}  # fmt: skip


def main(name: str, paths: list[str]) -> int:
    """Quantize, compare, print -> the exit code."""
    engine = _ENGINES[name]
    sys.path[:0] = [str(Path(path).resolve()) for path in paths]
    if engine.kernels:
        import_module("transformers").AutoConfig  # noqa: B018 - looks for packages that stand empty after this
        sys.meta_path.insert(0, Empty(engine.kernels))
    os.environ |= {"VLLM_TARGET_DEVICE": "cpu", "VLLM_LOGGING_LEVEL": "ERROR"}
    warnings.filterwarnings("ignore")
    rows, fits = list[tuple[object, ...]](), True
    with TemporaryDirectory() as scratch, _one_rank(engine):
        model, text = Path(scratch) / "model", Path(scratch) / "text.txt"
        write_demo_model(model, SMALL)
        text.write_text("\n".join(Path(__file__).read_text().splitlines()[:40]))
        for variant, options in _VARIANTS.items():
            folder = Path(scratch) / f"q{len(rows)}"
            quantize(
                QuantizeOptions(
                    model=str(model), output=str(folder), precision=variant.partition(",")[0], calibration=str(text),
                    device_type="cpu", **options,
                )
            )  # fmt: skip
            schemes, count, wrong = compared(engine, folder)
            fits = fits and not wrong
            rows.append((variant, ", ".join(schemes), count, wrong[0] if wrong else "all fit"))
    title = f"{name} {import_module(name).__version__}"
    print_table(("precision", "scheme", "linears", "parameters"), rows, title=title)
    return 0 if fits else 1


class Empty(MetaPathFinder, Loader):
    """Finds packages that hold whatever they are asked for, and none of it works."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names

    def find_spec(self, name: str, path: object, target: object = None) -> ModuleSpec | None:
        """Of a package that stands empty, or of a part of one."""
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] in self.names else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """A module all of whose names are there."""
        module = ModuleType(spec.name)
        module.__dict__["__getattr__"] = lambda name: _nothing(f"{spec.name}.{name}")
        return module

    def exec_module(self, module: ModuleType) -> None:
        """There is nothing to run."""


def _nothing(name: str) -> MagicMock:
    if name.rpartition(".")[2].startswith("__"):
        raise AttributeError(name)
    return MagicMock(name=name)


@contextmanager
def _one_rank(engine: Engine) -> Iterator[None]:
    """A world of one, a card of capability 9.0 as far as the schemes ask, and no kernels."""
    with ExitStack() as stack:
        if engine.room.startswith("vllm"):
            from vllm.platforms import current_platform
            from vllm.platforms.interface import DeviceCapability

            nine = DeviceCapability(9, 0)
            platform = type(current_platform)
            stack.enter_context(patch.object(platform, "get_device_capability", lambda *_a, **_k: nine))
        stack.enter_context(patch.object(torch.cuda, "get_device_capability", lambda *_a: (9, 0)))
        for module in _modules(f"{engine.room}.schemes"):
            for name in _OF_AN_ENGINE:
                if hasattr(module, name):
                    none = MagicMock()
                    none.return_value.__name__ = "NoKernel"
                    none.return_value.model_config.dtype = torch.bfloat16
                    stack.enter_context(patch.object(module, name, none))
        parameters = import_module(engine.parameters)
        for name in ("get_tensor_model_parallel_rank", "get_tensor_model_parallel_world_size"):
            if hasattr(parameters, name):
                value = 0 if name.endswith("rank") else 1
                stack.enter_context(patch.object(parameters, name, lambda value=value: value))
        yield


def _modules(package: str) -> list[ModuleType]:
    return [import_module(f"{package}.{found.name}") for found in pkgutil.iter_modules(import_module(package).__path__)]


class RowParallelLinear(torch.nn.Module):
    """Stands for an engine's layer of this name: schemes are found by the name of the class."""


def compared(engine: Engine, folder: Path) -> tuple[list[str], int, list[str]]:
    """The schemes that an engine takes, how many linears there are, and what does not fit."""
    config = json.loads((folder / "config.json").read_text())
    kind = import_module(f"{engine.room}.compressed_tensors").CompressedTensorsConfig
    reader = kind.from_config(config["quantization_config"])
    written = _tensors(folder)
    names = sorted(name.removesuffix("_proj.weight_scale") for name in written if name.endswith("_proj.weight_scale"))
    schemes, wrong = dict[str, None](), list[str]()
    for name in (f"{each}_proj" for each in names):
        mine = {key.removeprefix(f"{name}."): tensor for key, tensor in written.items() if key.startswith(f"{name}.")}
        (n, k), _ = mine["weight"] if "weight" in mine else mine["weight_packed"]
        k *= 1 if "weight" in mine else _PACKED
        layer: Any = RowParallelLinear()
        scheme = getattr(reader, engine.scheme_of)(layer, name)
        schemes[type(scheme).__name__ if scheme else "none"] = None
        if scheme is None:
            wrong.append(f"{name}: no scheme")
            continue
        scheme.create_weights(
            layer=layer, output_partition_sizes=[n], input_size_per_partition=k, params_dtype=torch.bfloat16,
            weight_loader=lambda *_: None, output_size=n, input_size=k,
        )  # fmt: skip
        wanted = {key: (tuple(one.shape), one.dtype) for key, one in layer.named_parameters() if one is not None}
        wrong += _differences(name, wanted, mine)
    return list(schemes), len(names), wrong


def _tensors(folder: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                tensor = file.get_tensor(name)
                found[name] = (tuple(tensor.shape), tensor.dtype)
    return found


def _differences(
    name: str, wanted: dict[str, tuple[tuple[int, ...], torch.dtype]], mine: dict[str, tuple[tuple[int, ...], Any]]
) -> list[str]:
    """Parameters without a tensor, of another size, or whose 8-bit numbers are of another kind; floats are cast."""
    wrong = []
    for key, (shape, dtype) in wanted.items():
        if key not in mine:
            wrong.append(f"{name}.{key}: not written")
            continue
        got_shape, got_dtype = mine[key]
        if torch.Size(got_shape).numel() != torch.Size(shape).numel() or (got_shape and got_shape[0] != shape[0]):
            wrong.append(f"{name}.{key}: {got_shape}, wanted {shape}")
        if dtype.itemsize == 1 and got_dtype != dtype:
            wrong.append(f"{name}.{key}: {got_dtype}, wanted {dtype}")
    wrong += [f"{name}.{key}: no parameter" for key in mine if key not in wanted]
    return wrong


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
