"""Predicted against measured makespan of plans in 8-bit precisions that were never run before: 24 of them on a CPU.

    python -m benchmarks.quantized_prediction [--output DIR] [--budget-s S]

The budget is for each precision's profile. Run it on an otherwise idle machine.
"""

from __future__ import annotations

from statistics import median

from benchmarks.measured_plans import Case, machines_from_arguments
from service.cli.output import print_table

REPEAT = 3
DTYPES = ("w8a16+float32", "w8a8+float32", "float32+kv-int8")
CASES = (
    Case(tp_size=1, pp_size=1, prompt_lens=(1500,)),
    Case(tp_size=1, pp_size=1, prompt_lens=(3000,), policy="fixed:768"),
    Case(tp_size=1, pp_size=2, prompt_lens=(1500,)),
    Case(tp_size=1, pp_size=2, prompt_lens=(3000,)),
    Case(tp_size=1, pp_size=2, prompt_lens=(3000,), policy="fixed:512"),
    Case(tp_size=1, pp_size=2, prompt_lens=(2000, 1000, 500)),
    Case(tp_size=2, pp_size=1, prompt_lens=(2000,)),
    Case(tp_size=2, pp_size=1, prompt_lens=(3000,), policy="fixed:512"),
)


def main() -> None:
    """Measure and print."""
    rows: list[list[object]] = []
    errors = []
    for machine in machines_from_arguments((__doc__ or "").splitlines()[0], context_length=4096, dtypes=DTYPES):
        for case in CASES:
            plan = machine.plan(case)
            result = machine.run(plan, repeat=REPEAT)
            assert result.error is not None
            errors.append(abs(result.error))
            print(f"{machine.dtype} {case.name}: {100 * result.error:+.1f} %", flush=True)
            rows.append([
                machine.dtype, case.name, len(plan.rounds), result.predicted_makespan_s, result.makespan_s,
                100 * result.error,
            ])  # fmt: skip
    print_table(
        ["precision", "plan", "rounds", "predicted s", "measured s", "error %"],
        rows,
        title=f"Median of {REPEAT} passes on {machine.hardware.device}, torch {machine.hardware.torch_version}",
    )
    print(f"Median error {100 * median(errors):.1f} %, worst {100 * max(errors):.1f} % over {len(errors)} plans")


if __name__ == "__main__":
    main()
