"""Hooks SGLang's own chunk sizer with our plug-in and compares what it then says with 20 plans.

    python -m venv engine && engine/bin/pip install -e . && engine/bin/pip install --no-deps sglang==0.5.23
    engine/bin/python -m benchmarks.engine_sizer [--plans 20]

The plug-in is found, loaded and applied by `sglang.srt.plugins.load_plugins`, as each of SGLang's processes does at its
start, with the variables that the exported script sets. Then the prompts of the longest request are cut as SGLang's
scheduler cuts them: the first chunk by the flag, each later one by `DynamicChunkSizer.predict`. No model runs, and no
card is needed: packages of kernels that SGLang's modules import and that are not installed stand there empty, and are
named. Prints a row a plan; exit code 1 unless every chunk is the plan's.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.abc
import importlib.machinery
import multiprocessing
import os
import sys
import tempfile
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.engine_rounds import some_plan
from service.cli.output import print_table
from service.engines.export import Engine, export
from service.engines.sglang_plugin import SIZER, VARIABLE
from tuner.plan.plan import Plan, save_plan

_KERNELS = frozenset({
    "cutlass", "deep_ep", "deep_gemm", "flash_attn", "flashinfer", "quack", "sgl_kernel", "tilelang",
    "torch_memory_saver", "torchaudio", "torchcodec", "torchvision",
})  # fmt: skip
_PAGES = (1, 64)


def main(num_plans: int) -> int:
    """Print what was kept -> the exit code."""
    empty = _Empty()
    _forget_vision()
    sys.meta_path.append(empty)
    module, _, name = SIZER.rpartition(".")
    sizer = getattr(importlib.import_module(module), name)
    print(f"{sizer.__module__} is SGLang's own; empty: {', '.join(sorted(empty.asked))}", file=sys.stderr)
    rows = []
    # SGLang applies plug-ins once a process: a child for each plan.
    with (
        tempfile.TemporaryDirectory(prefix="sizer-") as folder,
        multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as children,
    ):
        for seed in range(num_plans):
            plan, path = some_plan(seed, chunk_multiple=max(_PAGES)), Path(folder) / f"{seed}.json"
            save_plan(path, plan)
            for page in _PAGES:
                wanted = _chunks(plan)
                found = children.apply(_cut, (str(path), page, len(wanted)))
                same = sum(one == other for one, other in zip(wanted, found, strict=True))
                rows.append((seed, plan.parallel.pp_size, page, len(wanted), same))
    print_table(("plan", "stages", "page", "chunks", "as planned"), rows)
    print(f"{sum(row[4] for row in rows)} of {sum(row[3] for row in rows)} chunks as planned")
    return 0 if all(row[3] == row[4] for row in rows) else 1


def _cut(path: str, page: int, most: int) -> list[int]:
    """The chunks that SGLang makes of the longest prompt, its sizer hooked."""
    from tuner.plan.plan import load_plan

    plan = load_plan(path)
    made = export(plan, Engine.SGLANG)
    os.environ.update(made.environment)
    os.environ[VARIABLE] = path
    from sglang.srt.plugins import load_plugins

    load_plugins()
    flags = dict(flag.split("=", 1) for flag in made.flags if "=" in flag)
    module, _, name = SIZER.rpartition(".")
    own = getattr(importlib.import_module(module), name)
    sizer = own.__new__(own)
    # What `__init__` takes from the scheduler; its own predictor would need a model to be timed.
    sizer.page_size, sizer.max_prefill_tokens = page, int(flags["--max-prefill-tokens"])
    assert sizer.profile_and_fit() is True
    left, history, sizes = _longest(plan), 0, list[int]()
    while left and len(sizes) < most:
        size = min(left, sizer.predict(history) if history else int(flags["--chunked-prefill-size"]))
        sizes.append(size)
        left, history = left - size, history + size
    return sizes + [0] * (most - len(sizes))


def _longest(plan: Plan) -> int:
    return max(request.prompt_tokens for request in plan.requests)


def _chunks(plan: Plan) -> list[int]:
    """Of the longest request."""
    index = max(range(len(plan.requests)), key=lambda one: plan.requests[one].new_tokens)
    return [chunk.tokens for chunks in plan.rounds for chunk in chunks if chunk.request == index]


class _Empty(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds what nobody else found: a module whose every name is an empty class."""

    def __init__(self) -> None:
        self.asked: set[str] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Only for packages of kernels."""
        top = fullname.partition(".")[0]
        if top not in _KERNELS:
            return None
        self.asked.add(top)
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        """An empty one."""
        return _EmptyModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing runs."""


class _EmptyName(type):
    """A class with every name, each an empty class again."""

    def __getattr__(cls, name: str) -> Any:
        return _empty_class(name)

    def __getitem__(cls, _item: object) -> Any:
        return cls


class _EmptyModule(types.ModuleType):
    """A module whose every name is an empty class."""

    def __getattr__(self, name: str) -> Any:
        return _empty_class(name)


def _empty_class(name: str) -> _EmptyName:
    if name.startswith("__"):
        raise AttributeError(name)
    return _EmptyName(name, (), {})


def _forget_vision() -> None:
    """Let Transformers see for itself, before anything stands empty, that there is no torchvision."""
    from transformers.utils import import_utils

    for name in ("is_torchvision_available", "is_torchvision_v2_available"):
        if hasattr(import_utils, name):
            getattr(import_utils, name)()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plans", type=int, default=20)
    sys.exit(main(parser.parse_args().plans))
