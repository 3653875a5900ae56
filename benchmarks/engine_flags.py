"""Holds exported flags against engines' own sources, from wheels unpacked without their dependencies.

    pip download --no-deps -d wheels sglang==0.5.23 vllm==0.33.0
    for each: python -m zipfile -e wheels/NAME.whl unpacked
    python -m benchmarks.engine_flags unpacked

A flag counts as known where the engine's sources declare it: as a word `--flag`, or as a field of the arguments' class
(`flag_with_underscores:`), from which both engines make their parsers. Where an engine can be imported, its own parser
takes the flags, too. Prints a row a flag; exit code 1 if one is unknown.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from service.cli.output import print_table
from service.engines.export import Engine, export
from service.engines.sglang_plugin import SIZER
from tuner.plan.cost_model import CostModel
from tuner.plan.plan import Parallel, Plan, Request
from tuner.plan.stage_cost import StageCost
from tuner.rounds.round_plan import rounds_to_plan
from tuner.search.planner import plan_rounds

_SOURCES = {
    Engine.SGLANG: (
        "sglang/srt/server_args.py",
        "sglang/srt/arg_groups",
        "sglang/srt/environ.py",
        "sglang/srt/distributed/utils.py",
        "sglang/srt/plugins",
    ),
    Engine.VLLM: ("vllm/engine/arg_utils.py", "vllm/config", "vllm/envs.py"),
}


def main(folder: Path) -> int:
    """Print what is known and what is not -> the exit code."""
    rows: list[tuple[object, ...]] = []
    for engine, places in _SOURCES.items():
        text = "\n".join(_text(folder / place) for place in places)
        if not text.strip():
            continue
        made = export(_plan(), engine)
        for flag in made.flags:
            name = flag.partition("=")[0]
            rows.append((engine.value, name, _is_flag(text, name)))
        rows += [(engine.value, name, name in text) for name in made.environment if not name.startswith("ISOCHUNK")]
    sizer = folder / (SIZER.rpartition(".")[0].replace(".", "/") + ".py")
    if sizer.exists():
        text = sizer.read_text()
        for word in ("class DynamicChunkSizer", "def predict(self, history_len: int)", "def profile_and_fit(self)"):
            rows.append((Engine.SGLANG.value, word, word in text))
    for engine, parse in _PARSERS.items():
        try:
            rows.append((engine.value, "its own parser takes all", parse(list(export(_plan(), engine).flags))))
        except ImportError as error:
            print(f"{engine.value}: its parser cannot be imported here ({error})", file=sys.stderr)
    print_table(("engine", "flag or name", "known"), rows, title=f"Exported flags in the sources under {folder}")
    return 0 if rows and all(row[2] for row in rows) else 1


def _parse_vllm(flags: list[str]) -> bool:
    from vllm import platforms
    from vllm.platforms.cpu import CpuPlatform

    platforms.current_platform = CpuPlatform()
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return _takes(AsyncEngineArgs.add_cli_args(FlexibleArgumentParser()), flags)


def _parse_sglang(flags: list[str]) -> bool:
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    return _takes(parser, ["--model-path=any", *flags])


def _takes(parser: argparse.ArgumentParser, flags: list[str]) -> bool:
    try:
        parser.parse_args(flags)
    except SystemExit:
        return False
    return True


_PARSERS = {Engine.VLLM: _parse_vllm, Engine.VLLM_ASCEND: _parse_vllm, Engine.SGLANG: _parse_sglang}


def _is_flag(text: str, name: str) -> bool:
    field = name.removeprefix("--").replace("-", "_")
    return f'"{name}"' in text or re.search(rf"^\s+{field}\s*:", text, re.MULTILINE) is not None


def _text(place: Path) -> str:
    paths = [place] if place.is_file() else sorted(place.rglob("*.py"))
    return "\n".join(path.read_text() for path in paths)


def _plan() -> Plan:
    """A plan that uses everything that can be said."""
    stage = StageCost(token_count=(0, 65536), token_seconds=(0.0, 0.4), round_overhead_s=0.04)
    cost = CostModel(stages=(stage,) * 4)
    requests = (Request(id="a", prompt_tokens=65536), Request(id="b", prompt_tokens=4096))
    parallel = Parallel(tp_size=2, pp_size=4, layer_partition=(9, 8, 8, 7))
    planned = plan_rounds(cost, requests)
    return rounds_to_plan(
        planned,
        requests=requests,
        model={"name": "any"},
        precision="bfloat16",
        parallel=parallel,
        window=None,
        cost_model=cost.to_json(),
    )


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
