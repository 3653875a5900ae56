"""Attention kernels on one card, chunk by context: TFLOP/s of the causal work, first calls, and errors against float64.

    python -m benchmarks.gpu_attention [--chunks N,...] [--contexts N,...] [--output FILE] [--flashinfer-s S]

Each kernel that is installed takes its turn at every point, over and over, so that all meet the same clocks; calls are
replayed from recordings, as in a run. FlashInfer compiles its kernels on the spot, beside the measurements; it is left
out when that takes longer than `--flashinfer-s`.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch

from db.files.documents import write_json
from db.files.numbers import whole_number
from profiler.kernels import flash3_attention
from profiler.kernels.attention import attend, attend_partial, available_kernels
from profiler.kernels.recording import new_scratch, record
from service.cli.output import print_table

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
SLABS, NUM_BLOCKS, BLOCK_S = 2, 5, 0.03
CHECKED = ((300, 0), (257, 1000), (2048, 30000))
SHARED_ROUNDS = ((16, 512, 4096), (8, 1024, 16384), (4, 2048, 32768))  # requests, tokens and context of each
_COMPILE = "from benchmarks.gpu_attention import flashinfer_once; flashinfer_once()"
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # q, k, v -> out


@dataclass(frozen=True, slots=True)
class Contestant:
    """A kernel by its name; q: [H, c, D], k and v: [KV, p + c, D] -> [H, c, D]."""

    name: str
    attend: Attend


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What one kernel took at one point."""

    kernel: str
    chunk: int
    context: int
    first_ms: float  # the first call with these sizes, on the host
    us: float
    recorded: bool

    @property
    def tflops(self) -> float:
        """Of the work under the causal mask."""
        pairs = self.chunk * self.context + self.chunk * (self.chunk + 1) / 2
        return 4 * HEADS * HEAD_DIM * pairs / self.us * 1e-6


def flashinfer_attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """FlashInfer's kernel for Hopper."""
    from flashinfer import single_prefill_with_kv_cache

    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    out: torch.Tensor = single_prefill_with_kv_cache(q, k, v, causal=True, kv_layout="NHD", backend="fa3")
    return out.transpose(0, 1)


def flashinfer_once() -> None:
    """One call, which compiles what there is not yet."""
    flashinfer_attend(*operands(128, 128))
    torch.cuda.synchronize()


def operands(chunk: int, context: int, copy: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q as a layer gives it, keys and values as rows of a slab."""
    torch.manual_seed(copy)
    make = partial(torch.randn, device="cuda", dtype=torch.bfloat16)
    keys, values = (make(KV_HEADS, context + chunk + 128, HEAD_DIM)[:, : context + chunk] for _ in range(2))
    return make(chunk, HEADS, HEAD_DIM).transpose(0, 1), keys, values


def error_of(contestant: Contestant, chunk: int, context: int) -> float:
    """The largest difference to float64 on some rows, as a share of the largest value there."""
    q, k, v = operands(chunk, context)
    rows = torch.tensor(sorted({0, 1, chunk // 3, chunk // 2, chunk - 2, chunk - 1}), device="cuda")
    group = HEADS // KV_HEADS
    exact_k, exact_v = (x.double().repeat_interleave(group, dim=0) for x in (k, v))
    scores = q[:, rows].double() @ exact_k.transpose(1, 2) / math.sqrt(HEAD_DIM)
    hidden = torch.arange(context + chunk, device="cuda") > (context + rows)[:, None]
    exact = scores.masked_fill(hidden, -torch.inf).softmax(dim=-1) @ exact_v
    found = contestant.attend(q, k, v)[:, rows].double()
    return float((found - exact).abs().max() / exact.abs().max())


def lse_errors(chunk: int, context: int) -> list[tuple[str, float, float]]:
    """(name, error of the output, of the log-sum-exp) of attention over the context alone."""
    q, k, v = operands(chunk, context)
    k, v = k[:, :context], v[:, :context]
    group = HEADS // KV_HEADS
    scores = q.double() @ k.double().repeat_interleave(group, dim=0).transpose(1, 2) / math.sqrt(HEAD_DIM)
    exact = scores.softmax(dim=-1) @ v.double().repeat_interleave(group, dim=0)
    exact_lse = scores.logsumexp(dim=-1, keepdim=True)
    part = attend_partial(q, k, v, causal=False)
    found = [("cudnn", part.out, part.lse)]
    if flash3_attention.is_available(q.device):
        found.append(("flash3", *flash3_attention.attend_with_lse(q, k, v, causal=False)))
    return [
        (name, float((out.double() - exact).abs().max()), float((lse.double() - exact_lse).abs().max()))
        for name, out, lse in found
    ]


def measure(contestants: Sequence[Contestant], chunk: int, context: int) -> list[Found]:
    """Each kernel in turn, block by block; the median block of each."""
    inputs = [operands(chunk, context, copy) for copy in range(SLABS)]
    blocks = list[tuple[Contestant, float, Callable[[], object], int, bool]]()
    for contestant in contestants:
        try:
            began = time.perf_counter()
            contestant.attend(*inputs[0])
            torch.cuda.synchronize()
            first_s = time.perf_counter() - began
            once_s = _seconds(partial(contestant.attend, *inputs[1]))
            num_calls = max(2, math.ceil(BLOCK_S / once_s))
            num_calls = min(num_calls, 400)

            def work(contestant: Contestant = contestant, num_calls: int = num_calls) -> None:
                for call in range(num_calls):
                    contestant.attend(*inputs[call % SLABS])

            work()
            try:
                replay: Callable[[], object] = record(work, torch.device("cuda"), new_scratch(torch.device("cuda")))
                recorded = True
            except RuntimeError:
                replay, recorded = work, False
            blocks.append((contestant, first_s, replay, num_calls, recorded))
        except Exception as error:  # a kernel that refuses a size is left out of it, whatever it raises
            print(f"{contestant.name} at {chunk} after {context}: {type(error).__name__}: {error}"[:300], flush=True)
            torch.cuda.synchronize()
    times = [[_seconds(block[2]) / block[3] for block in blocks] for _ in range(NUM_BLOCKS)]
    return [
        Found(kernel=one.name, chunk=chunk, context=context, first_ms=1e3 * first_s, us=1e6 * us, recorded=recorded)
        for (one, first_s, _, _, recorded), us in zip(blocks, np.median(times, axis=0), strict=True)
    ]


def in_one_launch(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, row_starts: torch.Tensor, slab_starts: torch.Tensor,
    lengths: torch.Tensor, most_rows: int, most_keys: int,
) -> torch.Tensor:  # fmt: skip
    """FlashAttention-3 for several requests at once: rows of q by `row_starts`, of the slab by `slab_starts`."""
    flash3_attention.load()
    out: torch.Tensor = torch.ops.fa3_fwd.fwd(
        q, keys.transpose(0, 1), values.transpose(0, 1), cu_seqlens_q=row_starts, cu_seqlens_k=slab_starts,
        seqused_k=lengths, max_seqlen_q=most_rows, max_seqlen_k=most_keys, is_causal=True, num_splits=1,
    )[0]  # fmt: skip
    return out


def shared_rounds() -> list[list[object]]:
    """Rounds of several requests: a launch for each, and one for all."""
    table = list[list[object]]()
    for requests, tokens, context in SHARED_ROUNDS:
        rows = context + tokens
        make = partial(torch.randn, device="cuda", dtype=torch.bfloat16)
        q, keys, values = (
            make(requests * tokens, HEADS, HEAD_DIM), *(make(KV_HEADS, requests * rows, HEAD_DIM) for _ in range(2)),
        )  # fmt: skip

        def each(
            q: torch.Tensor = q, keys: torch.Tensor = keys, values: torch.Tensor = values, requests: int = requests,
            tokens: int = tokens, rows: int = rows,
        ) -> torch.Tensor:  # fmt: skip
            outs = [
                flash3_attention.attend(
                    q[index * tokens : (index + 1) * tokens].transpose(0, 1),
                    keys[:, index * rows : (index + 1) * rows],
                    values[:, index * rows : (index + 1) * rows],
                ).transpose(0, 1)
                for index in range(requests)
            ]
            return torch.cat(outs)

        numbers = partial(torch.tensor, dtype=torch.int32, device="cuda")
        together = partial(
            in_one_launch, q, keys, values,
            row_starts=numbers(range(0, (requests + 1) * tokens, tokens)),
            slab_starts=numbers(range(0, (requests + 1) * rows, rows)), lengths=numbers([rows] * requests),
            most_rows=tokens, most_keys=rows,
        )  # fmt: skip
        difference = float((each().float() - together().float()).abs().max())
        times = [min(_seconds(work) for _ in range(8)) for work in (each, together)]
        table.append([requests, tokens, context, 1e6 * times[0], 1e6 * times[1], difference])
    return table


def main() -> None:
    """Check, measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--chunks", default="512,1024,2048,4096,8192")
    parser.add_argument("--contexts", default="0,4096,16384,32768,65536,131072")
    parser.add_argument("--flashinfer-s", type=float, default=240.0)
    parser.add_argument("--output", type=Path, default=Path("gpu-attention.json"))
    options = parser.parse_args()
    chunks = [whole_number("chunks", text, most=1 << 20) for text in options.chunks.split(",")]
    contexts = [whole_number("contexts", text, least=0, most=1 << 20) for text in options.contexts.split(",")]
    compiling = _compile_flashinfer()
    with torch.inference_mode():
        print(f"{torch.cuda.get_device_name()}, {_versions()}", flush=True)
        kernels = available_kernels(torch.device("cuda"), torch.bfloat16)
        contestants = [Contestant(kernel.value, partial(attend, kernel)) for kernel in kernels if kernel != "sdpa"]
        found, deadline = list[Found](), time.monotonic() + options.flashinfer_s
        _check(contestants)
        for chunk in chunks:
            for context in contexts:
                found += measure(contestants, chunk, context)
            _print(found, chunk)
        if flash3_attention.is_available(torch.device("cuda")):
            heads = ["requests", "tokens", "context", "us, a launch each", "us, one launch", "difference"]
            print_table(heads, shared_rounds(), title="Rounds of several requests, flash3")
        if compiling is not None:
            found += _flashinfer(compiling, deadline, chunks, contexts)
    document = [
        {"kernel": one.kernel, "chunk": one.chunk, "context": one.context, "us": one.us, "tflops": one.tflops,
         "first_ms": one.first_ms, "recorded": one.recorded}
        for one in found
    ]  # fmt: skip
    write_json(options.output, {"device": torch.cuda.get_device_name(), "versions": _versions(), "points": document})


def _check(contestants: Sequence[Contestant]) -> None:
    table = [[one.name, *(error_of(one, chunk, context) for chunk, context in CHECKED)] for one in contestants]
    print_table(["kernel", *(f"{c} after {p}" for c, p in CHECKED)], table, title="Largest error against float64")
    print_table(["kernel", "output", "log-sum-exp"], [list(row) for row in lse_errors(300, 1000)], title="Partial")


def _print(found: Sequence[Found], chunk: int) -> None:
    here = [one for one in found if one.chunk == chunk]
    contexts = sorted({one.context for one in here})
    table = list[list[object]]()
    for kernel in dict.fromkeys(one.kernel for one in here):
        by_context = {one.context: one for one in here if one.kernel == kernel}
        cells = [by_context[at].tflops if at in by_context else None for at in contexts]
        first_ms = max(one.first_ms for one in by_context.values())
        table.append([kernel, *cells, first_ms, all(one.recorded for one in by_context.values())])
    heads = ["kernel", *map(str, contexts), "slowest first call, ms", "recorded"]
    print_table(heads, table, title=f"TFLOP/s, chunks of {chunk} by context ({_clock()})")
    sys.stdout.flush()


def _flashinfer(
    compiling: subprocess.Popen[bytes], deadline: float, chunks: Sequence[int], contexts: Sequence[int]
) -> list[Found]:
    """Its points beside those of the usual kernel once more, for the clocks may have changed."""
    try:
        failed = compiling.wait(max(deadline - time.monotonic(), 1.0))
    except subprocess.TimeoutExpired:
        compiling.kill()
        print("flashinfer: its kernels took too long to compile")
        return []
    if failed:
        print(f"flashinfer: its kernels could not be compiled (exit code {failed})")
        return []
    contestant, found = Contestant("flashinfer-fa3", flashinfer_attend), list[Found]()
    _check([contestant])
    for chunk in chunks:
        found += [one for context in contexts for one in measure([contestant], chunk, context)]
        _print(found, chunk)
    return found


def _compile_flashinfer() -> subprocess.Popen[bytes] | None:
    try:
        version("flashinfer-python")
    except PackageNotFoundError:
        return None
    return subprocess.Popen([sys.executable, "-c", _COMPILE], stdout=subprocess.DEVNULL)


def _seconds(work: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return 1e-3 * float(start.elapsed_time(end))


def _versions() -> str:
    found = [f"torch {torch.__version__}", f"cuDNN {torch.backends.cudnn.version()}"]
    for package in ("nvidia-cudnn-frontend", "fa3-fwd", "flashinfer-python"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"no {package}")
    return ", ".join(found)


def _clock() -> str:
    """The card's clock and power at this moment."""
    asked = ["nvidia-smi", "--query-gpu=clocks.sm,power.draw", "--format=csv,noheader"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return "clock unknown"
    return done.stdout.strip()


if __name__ == "__main__":
    main()
