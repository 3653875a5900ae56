"""A prompt of 8192 tokens, one thread a rank on two cores: the tuned pipeline against one rank, one chunk and TP2.

    python -m benchmarks.speedup [--output DIR] [--budget-s S]

All plans are run in turn, several times over, and the ratios are taken within each turn: they hold where the machine's
speed drifts.
"""

from __future__ import annotations

from statistics import median

from benchmarks.measured_plans import Case, machine_from_arguments
from service.cli.output import print_table

PROMPT_TOKENS = 8192
NUM_TURNS = 3
TUNED = Case(tp_size=1, pp_size=2, prompt_lens=(PROMPT_TOKENS,))
OTHERS = {
    "one rank": Case(tp_size=1, pp_size=1, prompt_lens=(PROMPT_TOKENS,)),
    "one chunk (GPipe)": Case(tp_size=1, pp_size=2, prompt_lens=(PROMPT_TOKENS,), policy="gpipe"),
    "TP2": Case(tp_size=2, pp_size=1, prompt_lens=(PROMPT_TOKENS,)),
}


def main() -> None:
    """Measure and print."""
    machine = machine_from_arguments((__doc__ or "").splitlines()[0], context_length=PROMPT_TOKENS)
    plans = {name: machine.plan(case) for name, case in {"tuned PP2": TUNED, **OTHERS}.items()}
    seconds: dict[str, list[float]] = {name: [] for name in plans}
    for turn in range(NUM_TURNS):
        for name, plan in plans.items():
            seconds[name].append(machine.run(plan, repeat=1).makespan_s)
            print(f"turn {turn + 1} of {NUM_TURNS}, {name}: {seconds[name][-1]:.2f} s", flush=True)
    tuned = seconds["tuned PP2"]
    rows: list[list[object]] = []
    for name, plan in plans.items():
        ratios = [other / ours for other, ours in zip(seconds[name], tuned, strict=True)]
        assert plan.predicted is not None
        rows.append([
            name, len(plan.rounds), plan.predicted.makespan_s, median(seconds[name]), median(ratios), min(ratios),
            max(ratios),
        ])  # fmt: skip
    print_table(
        ["plan", "rounds", "predicted s", "measured s", "over tuned", "least", "most"],
        rows,
        title=f"{PROMPT_TOKENS} tokens on {machine.hardware.device}, torch {machine.hardware.torch_version}",
    )


if __name__ == "__main__":
    main()
