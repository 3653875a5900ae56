"""Plans on two cards over the link that NCCL is made to take: predicted, run, and kept as JSON for `gpu_report`.

    python -m benchmarks.gpu_plans SET ... [--model NAME] [--db URL] [--budget-s S] [--output FILE]

SETs name cases below. All plans are made before the first one runs, so that none profits from another's run.
`NCCL_P2P_DISABLE=1` stands for PCIe, `NCCL_SHM_DISABLE=1 NCCL_SOCKET_IFNAME=lo` besides for Ethernet.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path

from benchmarks.measured_plans import Case, Machine
from db.files.documents import write_json
from db.store.provenance import code_version, now
from runtime.run.result import RunResult
from service.cli.output import print_table
from tuner.plan.plan import Plan

LONG, LONGEST = (32768,), (131072,)
MIXED = (65536, 32768, 16384, 16384, 8192, 8192, 8192, 8192, 4096, 4096, 4096, 4096, 2048, 2048, 2048, 2048)
SHORT = (1024,) * 64
FIXED = tuple(f"fixed:{tokens}" for tokens in (512, 1024, 2048, 4096, 8192, 16384, 32768))
ALL = ("joint", "dp", "ascend", "sglang", "terapipe", "gpipe", *FIXED)
TP = ("joint", "fixed:2048", "fixed:8192")  # with one stage only the rounds' size counts
MIDDLE = (20000, 10000, 5000)


def sweep(lengths: Sequence[int], pp2: Sequence[str], tp2: Sequence[str]) -> list[Case]:
    """A workload under policies on two stages and on two tensor-parallel ranks."""
    lengths = tuple(lengths)
    return [
        *(Case(tp_size=1, pp_size=2, prompt_lens=lengths, policy=policy) for policy in pp2),
        *(Case(tp_size=2, pp_size=1, prompt_lens=lengths, policy=policy) for policy in tp2),
    ]


def one_card(lengths: Sequence[int], *policies: str) -> list[Case]:
    """A workload on one card."""
    return [Case(tp_size=1, pp_size=1, prompt_lens=tuple(lengths), policy=policy) for policy in policies]


SETS = {
    "long": sweep(LONG, ALL, TP),
    "longest": sweep(LONGEST, ALL, TP),
    "mixed": sweep(MIXED, ALL, TP),
    "short": sweep(SHORT, ALL, TP),
    "one": [
        *one_card(LONG, "joint", "fixed:2048", "fixed:8192"),
        *one_card((4096,), "joint"),
        *one_card(SHORT, "joint"),
    ],
    "more": [
        *sweep((4096,), ["joint"], ["joint"]),
        *sweep((8192,), ["joint", "fixed:1024"], ["joint"]),
        *sweep((16384,), ["joint"], ["joint"]),
        *sweep(MIDDLE, ["joint", "fixed:4096"], ["joint"]),
    ],
    "link": [
        *sweep(LONG, ["joint"], ["joint"]),
        *sweep((8192,), ["joint"], ["joint"]),
        *sweep(MIDDLE, ["joint"], ["joint"]),
        *sweep(SHORT, ["joint"], []),
    ],
    "tiny": [*sweep((512,), ["joint", "fixed:128"], ["joint"]), *sweep((300, 200), ["joint"], [])],
}


LAUNCH = 20  # cases at most on ranks that are started once: what a failure may lose


def ordered(cases: Sequence[Case]) -> Iterator[list[Case]]:
    """Cases that run on as many ranks together, those of a layout one after another."""

    def size(case: Case) -> tuple[int, int]:
        return case.tp_size * case.pp_size, case.tp_size

    for _, alike in groupby(sorted(dict.fromkeys(cases), key=size), key=lambda case: case.tp_size * case.pp_size):
        same = list(alike)
        for first in range(0, len(same), LAUNCH):
            yield same[first : first + LAUNCH]


def row_of(case: Case, plan: Plan, result: RunResult, sets: Sequence[str]) -> dict[str, object]:
    """What the report needs of a run."""
    assert plan.predicted is not None
    stages = range(case.pp_size)
    busy = [sum(one.finish_s - one.start_s for one in result.rounds if one.stage == stage) for stage in stages]
    expected = [sum(one.predicted_s or 0.0 for one in result.rounds if one.stage == stage) for stage in stages]
    return asdict(case) | {
        "sets": list(sets),
        "layer_partition": plan.parallel.layer_partition,
        "rounds": [[[chunk.request, chunk.start, chunk.tokens] for chunk in chunks] for chunks in plan.rounds],
        "predicted_s": plan.predicted.makespan_s,
        "uncertainty": plan.predicted.uncertainty,
        "gap": plan.predicted.gap,
        "measured_s": result.makespan_s,
        "passes_s": result.makespans_s,
        "rested_s": result.rested_makespan_s,
        "warm_up_s": result.warm_up_s,
        "stage_busy_s": busy,
        "stage_predicted_s": expected,
        "mfu": result.mfu,
        "run_id": result.run_id,
    }


def main() -> None:
    """Profile what is missing, plan, run, and write after each launch."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sets", nargs="+", choices=SETS)
    parser.add_argument("--model", default="llama-3-8b", help="a bundled shape or a folder")
    parser.add_argument("--db", default="sqlite:///gpu.db", help="where measurements and runs are kept")
    parser.add_argument("--budget-s", type=float, default=150.0, help="for profiling what the database does not hold")
    parser.add_argument("--context-length", type=int, default=131072)
    parser.add_argument(
        "--repeat", type=int, default=2, help="passes of each plan; the median counts, the lower of two"
    )
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--output", type=Path, default=Path("gpu-plans.json"))
    options = parser.parse_args()
    machine = Machine(
        options.model, database_url=options.db, context_length=options.context_length, budget_s=options.budget_s,
        device_type=options.device, dtype="bfloat16" if options.device == "cuda" else "float32",
        chunk_multiple=256 if options.device == "cuda" else 64,
    )  # fmt: skip
    profile = machine.profile
    print(f"profile: {profile.num_new} new, {profile.num_missing} missing, {profile.num_noisy} noisy", flush=True)
    sets_of = {
        case: [name for name in options.sets if case in SETS[name]] for name in options.sets for case in SETS[name]
    }
    rows: list[dict[str, object]] = []
    launches = [(cases, [machine.plan(case) for case in cases]) for cases in ordered(list(sets_of))]
    for cases, plans in launches:
        started = time.perf_counter()
        results = machine.run_all(plans, repeat=options.repeat)
        print(
            f"{len(cases)} plans on {cases[0].tp_size * cases[0].pp_size} ranks: {time.perf_counter() - started:.0f} s"
        )
        for case, plan, result in zip(cases, plans, results, strict=True):
            rows.append(row_of(case, plan, result, sets_of[case]))
        report = {
            "model": options.model,
            "hardware": asdict(machine.hardware),
            "measured_at": now().isoformat(),
            "code_version": code_version(),
            "profile": {"elapsed_s": profile.elapsed_s, "new": profile.num_new, "missing": profile.num_missing,
                        "noisy": profile.num_noisy},
            "held_out": {
                str(tp_size): [error.to_json() for error in machine.held_out(tp_size, 2)] for tp_size in (1, 2)
            },
            "rows": rows,
        }  # fmt: skip
        write_json(options.output, report)
    print_table(
        [
            "plan", "rounds", "predicted s", "± %", "measured s", "error %", "least s", "most s", "from rest s",
            "warm-up s", "MFU %",
        ],
        [
            [
                _name(row), len(row["rounds"]), row["predicted_s"], 100 * (row["uncertainty"] or 0), row["measured_s"],
                100 * (row["predicted_s"] / row["measured_s"] - 1), min(row["passes_s"]), max(row["passes_s"]),
                row["rested_s"], row["warm_up_s"], None if row["mfu"] is None else 100 * row["mfu"],
            ]
            for row in json.loads(json.dumps(rows))
        ],
        title=f"{options.model} on {machine.hardware.device}, {machine.hardware.link}",
    )  # fmt: skip


def _name(row: dict[str, object]) -> str:
    lengths = row["prompt_lens"]
    assert isinstance(lengths, list)
    text = "+".join(map(str, lengths)) if len(lengths) < 4 else f"{len(lengths)} prompts, {sum(lengths)} tokens"
    return f"TP{row['tp_size']} PP{row['pp_size']} {row['policy']} {text}"


if __name__ == "__main__":
    main()
