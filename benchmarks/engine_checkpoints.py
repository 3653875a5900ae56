"""Holds written quantized checkpoints against vLLM's own loader: its configuration class, schemes and parameters.

    pip download --no-deps -d wheels vllm==0.33.0; python -m zipfile -e wheels/vllm-*.whl unpacked
    pip install --no-deps --target imports compressed-tensors==0.17.0 ...  # what its modules import, one by one
    python -m benchmarks.engine_checkpoints unpacked imports

A small model is quantized to every precision. vLLM's `CompressedTensorsConfig` reads `quantization_config`, names the
scheme of each linear as on a card of capability 9.0, and the scheme makes the parameters that its loader fills: names,
shapes and kinds of numbers are compared with the tensors written. Its kernels, which need a card, are not made.
Prints a row a precision; exit code 1 if one does not fit.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
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
_SCHEMES = "vllm.model_executor.layers.quantization.compressed_tensors.schemes"
_OF_AN_ENGINE = (
    "init_int8_linear_kernel", "init_fp8_linear_kernel", "init_wfp8_a16_linear_kernel", "choose_mp_linear_kernel",
    "get_current_vllm_config",
)  # fmt: skip
"""What schemes ask for that only an engine on a card has: kernels, and the model's 16-bit format."""


def main(paths: list[str]) -> int:
    """Quantize, compare, print -> the exit code."""
    sys.path[:0] = [str(Path(path).resolve()) for path in paths]
    os.environ |= {"VLLM_TARGET_DEVICE": "cpu", "VLLM_LOGGING_LEVEL": "ERROR"}
    warnings.filterwarnings("ignore")
    rows, fits = list[tuple[object, ...]](), True
    with TemporaryDirectory() as scratch, _one_rank():
        model, text = Path(scratch) / "model", Path(scratch) / "text.txt"
        write_demo_model(model, SMALL)
        text.write_text("\n".join(Path(__file__).read_text().splitlines() * 4))
        for variant, options in _VARIANTS.items():
            folder = Path(scratch) / f"q{len(rows)}"
            quantize(
                QuantizeOptions(
                    model=str(model), output=str(folder), precision=variant.partition(",")[0], calibration=str(text),
                    device_type="cpu", **options,
                )
            )  # fmt: skip
            schemes, count, wrong = compared(folder)
            fits = fits and not wrong
            rows.append((variant, ", ".join(schemes), count, wrong[0] if wrong else "all fit"))
    import vllm

    print_table(("precision", "scheme", "linears", "parameters"), rows, title=f"vLLM {vllm.__version__}")
    return 0 if fits else 1


@contextmanager
def _one_rank() -> Iterator[None]:
    """A world of one, a card of capability 9.0 as far as the schemes ask, and no kernels."""
    from vllm.platforms import current_platform
    from vllm.platforms.interface import DeviceCapability

    with ExitStack() as stack:
        stack.enter_context(
            patch.object(type(current_platform), "get_device_capability", lambda *_a, **_k: DeviceCapability(9, 0))
        )
        for module in _modules():
            for name in _OF_AN_ENGINE:
                if hasattr(module, name):
                    none = MagicMock()
                    none.return_value.__name__ = "NoKernel"
                    none.return_value.model_config.dtype = torch.bfloat16
                    stack.enter_context(patch.object(module, name, none))
        for name in ("get_tensor_model_parallel_rank", "get_tensor_model_parallel_world_size"):
            value = 0 if name.endswith("rank") else 1
            stack.enter_context(patch(f"vllm.model_executor.parameter.{name}", lambda value=value: value))
        yield


def _modules() -> list[Any]:
    import importlib
    import pkgutil

    package = importlib.import_module(_SCHEMES)
    return [importlib.import_module(f"{_SCHEMES}.{found.name}") for found in pkgutil.iter_modules(package.__path__)]


class RowParallelLinear(torch.nn.Module):
    """Stands for vLLM's layer of this name: schemes are found by the name of the class."""


def compared(folder: Path) -> tuple[list[str], int, list[str]]:
    """The schemes that vLLM takes, how many linears there are, and what does not fit."""
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig

    config = json.loads((folder / "config.json").read_text())
    reader = CompressedTensorsConfig.from_config(config["quantization_config"])
    written = _tensors(folder)
    names = sorted(name.removesuffix("_proj.weight_scale") for name in written if name.endswith("_proj.weight_scale"))
    schemes, wrong = dict[str, None](), list[str]()
    for name in (f"{each}_proj" for each in names):
        mine = {key.removeprefix(f"{name}."): tensor for key, tensor in written.items() if key.startswith(f"{name}.")}
        (n, k), _ = mine["weight"] if "weight" in mine else mine["weight_packed"]
        k *= 1 if "weight" in mine else _PACKED
        layer: Any = RowParallelLinear()
        scheme = reader.get_scheme(layer, name)
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
    sys.exit(main(sys.argv[1:]))
