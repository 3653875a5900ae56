"""A small model trained, pruned, recovered, quantized, planned and run in one go: what each step costs and gains.

    python -m benchmarks.smaller_model [--steps 400] [--seed 0] [--profile-seconds 40] [--folder DIR] [--output FILE]

Calls what the commands call. The last table says by the cost model, at several prompt lengths, which of the smaller
models is fastest that loses at most 3 % of perplexity: where pruning, quantizing or both win on this machine.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.pruning_chain import Study, loss_percent
from benchmarks.trained_model import HELD_OUT, SMALL, judge, parser, texts, write_texts
from db.errors import UserError
from db.files.documents import write_json
from profiler.measure.profile import ProfileOptions, profile_model
from profiler.model import load_model_shape
from profiler.model.shape import default_dtype
from service.cli.output import print_table
from service.use_cases.checkpoints.quantize import QuantizeOptions, quantize
from service.use_cases.run_plan import RunRequest, execute
from service.use_cases.tune import tune
from service.use_cases.tune_options import TuneOptions
from tuner.plan.layout import layout_of
from tuner.plan.plan import Plan

PROMPT, LENGTHS = 2048, (256, 1024, 2048, 4096)
MOST_LOSS = 0.03
REPEAT, MOST_PROFILES = 5, 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A checkpoint that was made on the way."""

    name: str
    folder: Path
    perplexity: float
    is_pruned: bool = False
    is_quantized: bool = False

    @property
    def mib(self) -> float:
        """Of its tensors' files."""
        return sum(path.stat().st_size for path in self.folder.glob("*.safetensors")) / 2**20


class Bench:
    """Profiles, plans and runs of variants on this machine: two ranks of one thread."""

    def __init__(self, place: Path, profile_s: float) -> None:
        self.place, self.profile_s = place, profile_s
        self.url = f"sqlite:///{place / 'isochunk.db'}"

    def profile(self, variant: Variant) -> None:
        """Measure what the database lacks."""
        shape = load_model_shape(str(variant.folder))
        profile_model(ProfileOptions(
            model=str(variant.folder), world_size=2, tp_sizes="1,2", context_length=max(LENGTHS), device_type="cpu",
            dtype=default_dtype(shape, "cpu"), threads_per_rank=1, budget_s=self.profile_s, db_url=self.url,
        ))  # fmt: skip

    def plan(self, variant: Variant, prompt: int) -> Plan:
        """The best layout and rounds for a prompt; on a busy machine the profile goes on until there is one."""
        for _ in range(MOST_PROFILES - 1):
            try:
                return self._plan(variant, prompt)
            except UserError as error:
                if error.field != "layouts":
                    raise
                self.profile(variant)
        return self._plan(variant, prompt)

    def _plan(self, variant: Variant, prompt: int) -> Plan:
        return tune(TuneOptions(
            model=str(variant.folder), world_size=2, prompt_lens=str(prompt), device_type="cpu", threads_per_rank=1,
            dtype=default_dtype(load_model_shape(str(variant.folder)), "cpu"), correct=False, keep=False,
            output=str(self.file(variant, prompt)), db_url=self.url,
        )).plan  # fmt: skip

    def run(self, variant: Variant, prompt: int) -> float:
        """Median seconds to the first token of a prompt as it was planned."""
        run = execute(RunRequest(
            plan=self.file(variant, prompt), weights=variant.folder, random_weights=False, prompts=None,
            max_new_tokens=1, check=False, trace=None, output=None, plot=None, repeat=REPEAT, device_type="cpu",
            threads_per_rank=1, dtype=None, db_url=self.url,
        ))  # fmt: skip
        return run.result.makespan_s

    def file(self, variant: Variant, prompt: int) -> Path:
        """Where a plan lies."""
        return self.place / f"{variant.folder.name}-{prompt}.json"


def made(study: Study, place: Path) -> list[Variant]:
    """The model, and the smaller ones: pruned, recovered, and quantized in `place`."""
    calibration = write_texts(place / "calibration.jsonl", texts().calibration)
    held_out = write_texts(place / "held-out.jsonl", texts().held_out)

    def quantized(name: str, source: Path, *, is_pruned: bool = False) -> Variant:
        output = place / f"{source.name}-w8a8"
        report = quantize(QuantizeOptions(
            model=str(source), output=str(output), calibration=str(calibration), held_out=str(held_out),
            device_type="cpu",
        ))  # fmt: skip
        assert report.perplexity_after is not None
        return Variant(
            name=name, folder=output, perplexity=report.perplexity_after, is_pruned=is_pruned, is_quantized=True
        )

    def plain(name: str, folder: Path) -> Variant:
        return Variant(name=name, folder=folder, perplexity=judge(folder), is_pruned=folder != study.model)

    found = [plain("trained", study.model), quantized("trained, W8A8", study.model)]
    for name in ("25 % of FFN", "50 % of FFN"):
        pruned = study.cut(name)
        recovered = study.recover(pruned)
        found += [
            plain(f"{name}: pruned", pruned),
            plain(f"{name}: recovered", recovered),
            quantized(f"{name}: recovered, W8A8", recovered, is_pruned=True),
        ]
    aware = study.recover(pruned, rounds_as="w8a8")
    found.append(quantized(f"{name}: recovered for W8A8, W8A8", aware, is_pruned=True))
    layers = study.recover(study.cut(f"1 of {SMALL.layers} layers"))
    found.append(plain(f"1 of {SMALL.layers} layers: recovered", layers))
    return found


def chain_rows(bench: Bench, variants: Sequence[Variant]) -> list[tuple[Any, ...]]:
    """Each variant: perplexity, size, and a prompt's time predicted and measured."""
    rows, first = [], variants[0].perplexity
    for variant in variants:
        plan = bench.plan(variant, PROMPT)
        assert plan.predicted is not None
        predicted, measured = plan.predicted.makespan_s, bench.run(variant, PROMPT)
        rows.append((
            variant.name, variant.perplexity, loss_percent(variant.perplexity, first), variant.mib,
            str(layout_of(plan.parallel)), 1e3 * predicted, 1e3 * measured, 100.0 * (predicted / measured - 1.0),
            PROMPT / measured,
        ))  # fmt: skip
    return rows


def contest_rows(bench: Bench, variants: Sequence[Variant]) -> list[tuple[Any, ...]]:
    """At each prompt length the fastest by the cost model of those that lose little: of each kind, and of all."""
    good = [one for one in variants if one.perplexity <= variants[0].perplexity * (1.0 + MOST_LOSS)]
    kinds = {
        "pruned": [one for one in good if one.is_pruned and not one.is_quantized],
        "quantized": [one for one in good if one.is_quantized and not one.is_pruned],
        "both": [one for one in good if one.is_pruned and one.is_quantized],
    }
    rows = []
    for prompt in LENGTHS:
        seconds: dict[str, float] = {}
        for one in good:
            predicted = bench.plan(one, prompt).predicted
            assert predicted is not None
            seconds[one.name] = predicted.makespan_s
        least = [min((seconds[one.name] for one in of_kind), default=float("nan")) for of_kind in kinds.values()]
        rows.append((prompt, *(1e3 * each for each in (seconds[variants[0].name], *least)),
                     min(seconds, key=seconds.__getitem__)))  # fmt: skip
    return rows


def main() -> None:
    """Make the models, profile, plan and run them, print both tables."""
    options_of = parser(__doc__, steps=400)
    options_of.add_argument("--seed", type=int, default=0)
    options_of.add_argument("--output", type=Path)
    options_of.add_argument("--profile-seconds", type=float, default=40.0, help="for each shape and format")
    options = options_of.parse_args()
    started = time.monotonic()

    def tell(what: str) -> None:
        print(f"{time.monotonic() - started:5.0f} s: {what}", flush=True)

    with tempfile.TemporaryDirectory() as place:
        study = Study.of(options, options.seed)
        tell("trained")
        variants = made(study, Path(place))
        tell("pruned, recovered, quantized")
        bench = Bench(Path(place), options.profile_seconds)
        for variant in variants:
            bench.profile(variant)
        tell("profiled")
        rows = chain_rows(bench, variants)
        tell("planned and run")
        columns = ("model", "perplexity", "loss %", "MiB", "layout", "predicted TTFT ms", "measured ms", "off %",
                   "tokens/s")  # fmt: skip
        title = f"a prompt of {PROMPT} tokens on two ranks of one thread; perplexity on {HELD_OUT} characters"
        print_table(columns, rows, title=title)
        contest = contest_rows(bench, variants)
        tell("compared")
    names = ("prompt", "trained ms", "pruned ms", "quantized ms", "both ms", "fastest")
    print_table(names, contest, title=f"fastest by the cost model, at most {MOST_LOSS:.0%} more perplexity")
    if options.output:
        write_json(options.output, {"columns": columns, "rows": rows, "names": names, "contest": contest})


if __name__ == "__main__":
    main()
