"""Hands thousands of bad files to every reader: `python -m benchmarks.fuzz_files --cases 20000`.

A case passes if its file is read or refused with a UserError of one printable line. Printed are, for each format, the
cases, how many were read, those that raised anything else or took longer than 10 s of CPU, and the longest; exit code
1 if there were any, or if more than 1 GiB was in use.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from benchmarks.bad_files import damaged, from_schema, written, written_lines
from db.errors import UserError
from db.rows.archive import Profile, import_hardware, read_profile
from db.rows.hardware import Hardware
from db.store.engine import open_database
from profiler.model import load_model_shape
from profiler.sequence.kind import SPKind
from runtime.run.prediction import read_prediction
from runtime.run.preparation import check_layout, model_shape, with_dtype
from runtime.run.prompts import PromptLine, Tokenizer, read_prompts
from runtime.weights.checkpoint import Checkpoint, WeightIndex
from runtime.weights.generation import end_ids
from service.cli.output import print_table
from tuner.plan.cost_model import CostModelFile, load_cost_model
from tuner.plan.layout import Layout
from tuner.plan.memory import check_memory
from tuner.plan.plan import Plan, Request, load_plan
from tuner.plan.topology import Topology, load_topology
from tuner.search.planner import plan_rounds
from tuner.workload.trace import WorkloadLine
from tuner.workload.workload import load_workload

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 100,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "eos_token_id": [1, 2],
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "layer_types": ["full_attention"] * 4,
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 64},
}  # fmt: skip
COST_MODEL: dict[str, Any] = {
    "schema": "isochunk.cost-model/1",
    "stages": [
        {"round_overhead_s": 0.04, "tokens": {"count": [0, 1024, 65536], "seconds": [0.0, 0.01, 0.395]},
         "attention": {"pair_s": 6.5e-10, "context_token_s": 5.39e-7}, "chunk_s": 1e-4, "final_s": 1e-4},
        {"tokens": {"count": [0, 65536], "seconds": [0.0, 0.4]},
         "attention": {"count": [1, 64], "base_s": [1e-5, 1e-4], "context_s": [0.0, 1e-6]}},
    ],
    "hop": {"latency_s": 1e-5, "token_s": 1e-9}, "return_s": 1e-5,
}  # fmt: skip
TOPOLOGY: dict[str, Any] = {
    "schema": "isochunk.topology/1", "hosts": 2, "cards_per_host": 4,
    "inside_host": {"bandwidth_gb_s": 300.0, "latency_us": 4.0},
    "between_hosts": {"bandwidth_gb_s": 25.0, "latency_us": 12.0},
}  # fmt: skip
PLAN: dict[str, Any] = {
    "schema": "isochunk.plan/1", "model": CONFIG, "precision": "float32", "window": 5, "threads_per_rank": 1,
    "parallel": {"tp_size": 1, "pp_size": 2, "sp_size": 1, "sp_mode": "none", "layer_partition": [2, 2]},
    "requests": [{"id": "a", "prompt_tokens": 100, "cached_tokens": 0, "arrival_s": 0.0, "weight": 2.0},
                 {"id": "b", "prompt_tokens": 30, "sla_ttft_s": 1.0}],
    "rounds": [[{"request": 0, "start": 0, "tokens": 60}],
               [{"request": 0, "start": 60, "tokens": 40}, {"request": 1, "start": 0, "tokens": 30}]],
    "predicted": {"makespan_s": 1.0, "lower_bound_s": 0.9, "gap": 0.1, "ttft_s": [0.9, 1.0], "planning_s": 0.01,
                  "round_s": [[0.3, 0.3], [0.2, 0.2]], "uncertainty": 0.1},
    "policy": "joint", "cost_model": COST_MODEL,
}  # fmt: skip
PROFILE: dict[str, Any] = {
    "schema": "isochunk.profile/1", "code_version": "0.1.0",
    "hardware": {"device": "Example CPU", "device_count": 2, "memory_bytes": 2**33, "driver": "6.1",
                 "torch_version": "2.13.0", "backend": "gloo", "num_threads": 1, "link": "lo"},
    "measurements": [
        {"op": "matmul", "dtype": "float32", "shape": {"m": 8 * row, "n": 512, "k": 256}, "group_size": 1,
         "busy_ranks": 1, "variant": "", "num_samples": 20, "median_us": 10.5, "p10_us": 9.5, "p90_us": 12.5,
         "min_us": 9.0, "std_us": 0.3, "noisy": False, "measured_at": "2026-03-01T12:00:00+00:00",
         "code_version": "0.1.0"} for row in (1, 2, 3)],
}  # fmt: skip
QUANTIZED: dict[str, Any] = CONFIG | {
    "quantization_config": {
        "quant_method": "compressed-tensors", "format": "int-quantized", "ignore": ["lm_head", "re:.*norm"],
        "config_groups": {"group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "strategy": "group", "group_size": 16, "symmetric": True},
            "input_activations": {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True},
        }},
    },
}  # fmt: skip
SIDECAR = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}}
HEADER: dict[str, Any] = {
    "__metadata__": {"format": "pt"},
    "model.norm.weight": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
    "lm_head.weight": {"dtype": "BF16", "shape": [2, 2], "data_offsets": [8, 16]},
}
INDEX = {"metadata": {"total_size": 8}, "weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors"}}
WORKLOAD = [{"timestamp": 1000 * n, "input_length": 100 + n, "output_length": 5, "hash_ids": [n]} for n in range(4)]
PROMPTS = [{"id": "r0", "token_ids": [1, 2, 3]}, {"id": "r1", "token_ids": [4, 5]}]
LIMIT_S, LIMIT_BYTES = 10.0, 1 << 30
REQUESTS = (Request(id="r0", prompt_tokens=3), Request(id="r1", prompt_tokens=2))
HARDWARE = Hardware(**PROFILE["hardware"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """One format: the file's name in a folder, a good content, its model, and all that reads it before ranks start."""

    file: str
    good: Any
    model: Any
    read: Callable[[Path], object]
    wrap: Callable[[bytes], bytes] = bytes
    """What stands around the JSON text in the file."""
    beside: Mapping[str, Any] = field(default_factory=dict)
    """Good files in the same folder."""

    def make(self, source: random.Random) -> bytes:
        """The bytes of a bad file."""
        schema = _schema(self.model)
        by_schema = self.model is not None and source.random() < 0.3
        if isinstance(self.good, list):
            lines = [from_schema(schema, source) for _ in range(3)] if by_schema else damaged(self.good, source)
            return written_lines(lines, source)
        content = from_schema(schema, source) if by_schema else damaged(self.good, source)
        if isinstance(content, dict) and "schema" in self.good and source.random() < 0.95:
            content["schema"] = self.good["schema"]
        return self.wrap(written(content, source))


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What became of one format's cases."""

    cases: int = 0
    read: int = 0
    longest_s: float = 0.0
    failures: list[str] | None = None


@cache
def _schema(model: Any) -> dict[str, Any]:
    return TypeAdapter(model).json_schema() if model else {}


def _read_plan(path: Path) -> None:
    plan = with_dtype(load_plan(path), None)
    shape = model_shape(plan.model, None)
    check_layout(plan, shape, max_new_tokens=1, device_type="cpu")
    check_memory(shape, plan, max_new_tokens=1, device_type="cpu", memory_bytes=HARDWARE.memory_bytes)
    read_prediction(plan)


def _read_cost_model(path: Path) -> None:
    cost = load_cost_model(path)
    plan_rounds(cost.for_pp_size(max(2, cost.pp_size)), [Request(id="a", prompt_tokens=1000)], window=3)


def _read_topology(path: Path) -> None:
    load_topology(path).reach(Layout(tp_size=2, pp_size=2, sp_size=2, sp_kind=SPKind.GATHER))


def _safetensors(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + bytes(16)


def _read_safetensors(path: Path) -> None:
    checkpoint = Checkpoint(path.parent)
    for name in checkpoint.file_of:
        checkpoint.shape_of(name)
        checkpoint.read(name)


def _read_profile(path: Path) -> None:
    read_profile(path)  # refused, no database is made for it
    with open_database("sqlite://") as database:
        import_hardware(database, path)


FORMATS = {
    "plan": Format(file="plan.json", good=PLAN, model=Plan, read=_read_plan),
    "cost model": Format(file="cost.json", good=COST_MODEL, model=CostModelFile, read=_read_cost_model),
    "topology": Format(file="topology.json", good=TOPOLOGY, model=Topology, read=_read_topology),
    "workload": Format(file="trace.jsonl", good=WORKLOAD, model=WorkloadLine, read=load_workload),
    "prompts": Format(
        file="prompts.jsonl",
        good=PROMPTS,
        model=PromptLine,
        read=lambda path: read_prompts(path, REQUESTS, Tokenizer(None)),
    ),
    "profile": Format(file="profile.json", good=PROFILE, model=Profile, read=_read_profile),
    "config": Format(file="config.json", good=CONFIG, model=None, read=lambda path: load_model_shape(str(path.parent))),
    "quantized config": Format(
        file="config.json", good=QUANTIZED, model=None, read=lambda path: load_model_shape(str(path.parent))
    ),
    "quantization beside": Format(
        file="hf_quant_config.json",
        good=SIDECAR,
        model=None,
        read=lambda path: load_model_shape(str(path.parent)),
        beside={"config.json": CONFIG},
    ),
    "safetensors": Format(file="model.safetensors", good=HEADER, model=None, read=_read_safetensors, wrap=_safetensors),
    "generation config": Format(
        file="generation_config.json", good={"eos_token_id": [1, 2]}, model=None, read=lambda path: end_ids(path.parent)
    ),
    "index": Format(
        file="model.safetensors.index.json",
        good=INDEX,
        model=WeightIndex,
        read=lambda path: Checkpoint(path.parent).file_of,
    ),
}


def try_cases(name: str, num_cases: int, seed: int, keep: Path | None = None) -> Outcome:
    """Read so many bad files of a format; the same seed makes the same files. keep: where those that fail are kept."""
    form, outcome = FORMATS[name], Outcome(failures=[])
    assert outcome.failures is not None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / form.file
        for other, content in form.beside.items():
            (path.parent / other).write_text(json.dumps(content))
        for number in range(num_cases):
            data = form.make(random.Random(f"{name} {seed} {number}"))
            path.write_bytes(data)
            started = time.process_time()  # of this process: others may keep the machine busy
            failure = _failure(form, path)
            outcome.cases += 1
            took_s = time.process_time() - started
            outcome.longest_s = max(outcome.longest_s, took_s)
            if took_s > LIMIT_S:
                failure = f"took {took_s:.1f} s"
            if failure is None:
                outcome.read += 1
            elif failure:
                outcome.failures.append(f"{name} {seed} {number}: {failure}")
                if keep is not None:
                    (keep / f"{name.replace(' ', '-')}-{seed}-{number}.json").write_bytes(data)
    return outcome


def _failure(form: Format, path: Path) -> str | None:
    """None for a file that was read, nothing for one that was refused as it should, else what went wrong."""
    try:
        form.read(path)
    except UserError as error:
        text = str(error)
        return "" if text.isprintable() and len(text) < 2500 else f"not one printable line: {text[:200]!r}"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:300]}"
    return None


def main() -> None:
    """Run the cases and print a row for each format."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="Folder for the files that fail.")
    options = parser.parse_args()
    per_format = max(1, options.cases // len(FORMATS))
    outcomes = {name: try_cases(name, per_format, options.seed, options.keep) for name in FORMATS}
    rows = [[name, one.cases, one.read, len(one.failures or ()), one.longest_s] for name, one in outcomes.items()]
    print_table(("format", "cases", "read", "not one line", "longest s"), rows)
    failures = [failure for one in outcomes.values() for failure in one.failures or ()]
    for failure in failures[:20]:
        print(failure)
    most_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    print(f"{len(failures)} failures; {most_bytes / 2**30:.2f} GiB at the most")
    sys.exit(1 if failures or most_bytes > LIMIT_BYTES else 0)


if __name__ == "__main__":
    main()
