"""A training step of Llama-3.2-1B shapes on one card: chunked rounds against plain PyTorch AMP on the same card.

    python -m benchmarks.gpu_training [--tokens 32768] [--arms NAME,...] [--output FILE]

Each arm is a process of its own: random weights, random tokens, one sequence a step, the same AdamW. `amp` is
Transformers' model in float32 under `torch.autocast(bfloat16)` with SDPA, the form in which PyTorch's documentation
shows mixed precision; `+ckpt` has gradient checkpointing, `+compile` the whole model compiled.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from db.files.documents import write_json
from profiler.hardware.datasheet import published_peak_flops
from profiler.model import ModelShape, load_model_shape, model_from_config
from profiler.model.flops import prefill_flops
from runtime.run.prompts import random_prompts
from runtime.train.recipe import TrainingRecipe
from runtime.train.train import train
from service.cli.output import print_table
from tuner.plan.plan import Chunk, Parallel, Plan, Request
from tuner.training.order import Recompute
from tuner.training.work import StepWork, step_memory

MODEL = "llama-3.2-1b"
STEPS, LONG_STEPS = 7, 3  # the first half of them, rounded down, warms up
RATE = 1e-5
LONG = 4  # times the tokens: one step of it takes as long as many
# Name: precision, chunks of a sequence, what is recomputed, how long the sequence is against `--tokens`.
OURS: dict[str, tuple[str, int, Recompute, int]] = {
    "whole": ("bfloat16", 1, Recompute.NONE, 1),
    "8 chunks": ("bfloat16", 8, Recompute.NONE, 1),
    "8 chunks linear": ("bfloat16", 8, Recompute.LINEAR, 1),
    "8 chunks layer": ("bfloat16", 8, Recompute.LAYER, 1),
    "8 chunks round": ("bfloat16", 8, Recompute.ROUND, 1),
    "8 chunks float16": ("float16", 8, Recompute.NONE, 1),
    "twice 16 chunks linear": ("bfloat16", 16, Recompute.LINEAR, 2),
    "four times 32 chunks round": ("bfloat16", 32, Recompute.ROUND, 4),
}
# Name: gradient checkpointing, compiled, length.
PLAIN: dict[str, tuple[bool, bool, int]] = {
    "amp": (False, False, 1),
    "amp+ckpt": (True, False, 1),
    "amp+compile": (False, True, 1),
    "amp+ckpt+compile": (True, True, 1),
    "twice amp+ckpt": (True, False, 2),
    "four times amp+ckpt": (True, False, 4),
}


def shape_of(size: str, tokens: int) -> ModelShape:
    """Llama-3.2-1B with as many positions as are trained on, or a small one of the same kind to try this with."""
    config = dict(load_model_shape(MODEL).config) | {"max_position_embeddings": max(tokens, 131072)}
    if size == "small":
        config |= {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 512,
                   "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}  # fmt: skip
    return model_from_config(config, name=MODEL)


def num_steps(times: int) -> int:
    """Steps of an arm whose sequence is so many times `--tokens`."""
    return LONG_STEPS if times >= LONG else STEPS


def measured(result: Mapping[str, Any]) -> list[float]:
    """Seconds of the steps after those that warm up."""
    seconds: list[float] = result["seconds"]
    return seconds[len(seconds) // 2 :]


def step_flops(shape: ModelShape, tokens: int) -> float:
    """FLOPs of a step, forward and backward."""
    return 3.0 * prefill_flops(shape, [(tokens, 0)], tokens - 1)


def run_ours(name: str, shape: ModelShape, tokens: int, device_type: str) -> dict[str, Any]:
    """An arm of ours."""
    precision, num_chunks, recompute, times = OURS[name]
    tokens *= times
    size = -(-tokens // num_chunks)
    chunks = [Chunk(0, start, min(size, tokens - start)) for start in range(0, tokens, size)]
    parallel = Parallel(tp_size=1, pp_size=1, layer_partition=(shape.num_layers,))
    requests = (Request(id="r0", prompt_tokens=tokens),)
    plan = Plan(
        model=dict(shape.config), precision=precision, parallel=parallel, requests=requests,
        rounds=tuple((chunk,) for chunk in chunks),
    )  # fmt: skip
    recipe = TrainingRecipe(steps=num_steps(times), learning_rate=RATE, precision=precision, recompute=recompute)
    data = random_prompts((Request(id="all", prompt_tokens=3 * tokens),), shape.vocab_size)
    result = train(
        plan, recipe, weights=None, sequences=data, output=None, device_type=device_type, num_threads=2
    )  # fmt: skip
    compiled = device_type == "cuda"
    work = StepWork(shape=shape, parallel=parallel, requests=requests, rounds=plan.rounds, precision=precision,
                    recompute=recompute, compiled=compiled)  # fmt: skip
    (memory,) = step_memory(work)
    return {
        "tokens": tokens,
        "seconds": [record.seconds for record in result.records],
        "losses": [record.loss for record in result.records],
        "skipped": result.skipped_steps,
        "reserved": result.reserved_bytes,
        "allocated": result.allocated_bytes,
        "predicted": memory.allocated_bytes,
    }


def run_plain(name: str, shape: ModelShape, tokens: int, device_type: str) -> dict[str, Any]:
    """An arm of PyTorch's."""
    import transformers

    checkpointed, compiled, times = PLAIN[name]
    tokens *= times
    config = transformers.AutoConfig.for_model(**{k: v for k, v in shape.config.items() if k != "dtype"})
    torch.manual_seed(0)
    with torch.device(device_type):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    model.train()
    if checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    run: Callable[..., Any] = torch.compile(model, dynamic=False) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), fused=True)
    data = random_prompts((Request(id="all", prompt_tokens=tokens),), shape.vocab_size)
    ids = torch.tensor(data, device=device_type)
    seconds, losses = [], []
    for _ in range(num_steps(times)):
        started = time.perf_counter()
        with torch.autocast(device_type, dtype=torch.bfloat16):
            loss = run(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss))
        seconds.append(time.perf_counter() - started)
    on_card = device_type == "cuda"
    return {
        "tokens": tokens,
        "seconds": seconds,
        "losses": losses,
        "reserved": torch.cuda.max_memory_reserved() if on_card else None,
        "allocated": torch.cuda.max_memory_allocated() if on_card else None,
        "predicted": None,
    }


def main() -> None:
    """Run each arm in a process of its own, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--size", choices=("1b", "small"), default="1b")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--arms", help="names after commas [default: all]")
    parser.add_argument("--limit", type=float, default=150.0, help="seconds of one arm at most")
    parser.add_argument("--budget", type=float, default=560.0, help="seconds of all; arms that are left are named")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    options = parser.parse_args()
    names = options.arms.split(",") if options.arms else [*OURS, *PLAIN]
    if options.arm:
        times = OURS[options.arm][3] if options.arm in OURS else PLAIN[options.arm][2]
        shape = shape_of(options.size, options.tokens * times)
        run = run_ours if options.arm in OURS else run_plain
        print("RESULT " + json.dumps(run(options.arm, shape, options.tokens, options.device)))
        return
    started, found = time.monotonic(), {}
    for name in names:
        left = options.budget - (time.monotonic() - started)
        if left < 20.0:
            print(f"{name}: not run, no time left", file=sys.stderr)
            continue
        found[name] = run_arm(name, options, min(options.limit, left))
        print(f"{name}: {summary(found[name])}", file=sys.stderr, flush=True)
    report(found, options)


def run_arm(name: str, options: argparse.Namespace, limit_s: float) -> dict[str, Any]:
    """What an arm measured, or why it did not."""
    command = [sys.executable, "-m", "benchmarks.gpu_training", "--arm", name, "--tokens", str(options.tokens),
               "--size", options.size, "--device", options.device]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False)
    except subprocess.TimeoutExpired as error:
        said = (error.stderr or b"").decode(errors="replace").splitlines()
        return {
            "failed": f"took more than {limit_s:.0f} s; last: {said[-1] if said else 'nothing said'}",
            "tail": said[-25:],
        }
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            result: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
            return result
    lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    telling = [line for line in lines if "Error" in line]
    return {"failed": (telling or lines or ["nothing said"])[-1][:300], "tail": lines[-25:]}


def summary(result: dict[str, Any]) -> str:
    """One line of an arm."""
    if "failed" in result:
        return f"failed: {result['failed']}"
    return f"{statistics.median(measured(result)):.3f} s a step, losses {result['losses'][0]:.3f}"


def report(found: dict[str, dict[str, Any]], options: argparse.Namespace) -> None:
    """The table, and the JSON."""
    device = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    peak = published_peak_flops(device, "bfloat16")
    rows = []
    for name, result in found.items():
        if "failed" in result:
            rows.append((name, None, None, None, None, None, None, None, result["failed"][:60]))
            continue
        tokens, step_s = result["tokens"], statistics.median(measured(result))
        mfu = step_flops(shape_of(options.size, tokens), tokens) / step_s / peak if peak else None
        memory = [x / 2**30 if x else None for x in (result[k] for k in ("predicted", "allocated", "reserved"))]
        rows.append((name, tokens, step_s, tokens / step_s, 100.0 * mfu if mfu else None, *memory, ""))
    columns = ("arm", "tokens", "s a step", "tokens/s", "MFU %", "predicted GiB", "allocated GiB", "reserved GiB", "")
    print_table(columns, rows, title=f"{MODEL} ({options.size}) on {device}, torch {torch.__version__}")
    if options.output:
        write_json(options.output, {"device": device, "torch": torch.__version__, "arms": found})


if __name__ == "__main__":
    main()
