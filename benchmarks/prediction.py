"""Predicted against measured makespan over plans that were never profiled as such: lengths, policies, PP2 and TP2.

python -m benchmarks.prediction [--output DIR] [--budget-s S]
"""

from __future__ import annotations

from statistics import median

from benchmarks.measured_plans import Case, machine_from_arguments
from service.cli.output import print_table

REPEAT = 3
CASES = (
    Case(tp_size=1, pp_size=2, prompt_lens=(1500,)),
    Case(tp_size=1, pp_size=2, prompt_lens=(3000,)),
    Case(tp_size=1, pp_size=2, prompt_lens=(3000,), policy="fixed:256"),
    Case(tp_size=1, pp_size=2, prompt_lens=(4096,)),
    Case(tp_size=1, pp_size=2, prompt_lens=(4096,), policy="fixed:512"),
    Case(tp_size=1, pp_size=2, prompt_lens=(4096,), policy="fixed:1024"),
    Case(tp_size=1, pp_size=2, prompt_lens=(6000,)),
    Case(tp_size=1, pp_size=2, prompt_lens=(6000,), policy="fixed:768"),
    Case(tp_size=1, pp_size=2, prompt_lens=(2500, 1000, 500)),
    Case(tp_size=1, pp_size=2, prompt_lens=(2500, 1000, 500), policy="fixed:384"),
    Case(tp_size=2, pp_size=1, prompt_lens=(2000,)),
    Case(tp_size=2, pp_size=1, prompt_lens=(4096,)),
    Case(tp_size=2, pp_size=1, prompt_lens=(4096,), policy="fixed:512"),
    Case(tp_size=1, pp_size=1, prompt_lens=(3000,)),
)


def main() -> None:
    """Measure and print."""
    machine = machine_from_arguments((__doc__ or "").splitlines()[0], context_length=8192)
    rows: list[list[object]] = []
    errors = []
    for number, case in enumerate(CASES, 1):
        plan = machine.plan(case)
        result = machine.run(plan, repeat=REPEAT)
        assert result.error is not None
        errors.append(abs(result.error))
        print(f"{number} of {len(CASES)}: {case.name}: {100 * result.error:+.1f} %", flush=True)
        rows.append([
            case.name, len(plan.rounds), result.predicted_makespan_s, result.makespan_s, 100 * result.error,
            min(result.makespans_s), max(result.makespans_s),
        ])  # fmt: skip
    print_table(
        ["plan", "rounds", "predicted s", "measured s", "error %", "least s", "most s"],
        rows,
        title=f"Median of {REPEAT} passes on {machine.hardware.device}, torch {machine.hardware.torch_version}",
    )
    print(f"Median error {100 * median(errors):.1f} %, worst {100 * max(errors):.1f} % over {len(errors)} plans")


if __name__ == "__main__":
    main()
