"""Options of `isochunk tune`: each with its help and what is allowed, declared once."""

from __future__ import annotations

import math
import os
import shlex
from dataclasses import dataclass

from db.errors import UserError
from db.files.numbers import share
from profiler.sequence.kind import SPKind
from service.use_cases.options import DB_VARIABLE, check_options, chosen, command_line, db_url, flag_of, option
from tuner.workload.objective import MAX_MAKESPAN_INCREASE, Objective
from tuner.workload.trace_format import TimeUnit, TraceFormat

SP_KINDS = ("auto", *(kind.value for kind in SPKind))


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneOptions:
    """Options of `isochunk tune`. Raises UserError for values that are not allowed, alone or together."""

    model: str | None = option(None, "Folder with a config.json, or a bundled shape.", flags=("MODEL",))
    backend: str = option("auto", "What runs its layers.", choices=("auto", "own", "transformers"))
    precision: str | None = option(
        None,
        "Plan as if the weights were converted to this; auto: to the fastest that was measured and loses little.",
        choices=("bf16", "fp8", "auto"),
    )
    world_size: int | None = option(None, "Ranks to plan for. [default: what the sizes kept need]", above=0)
    prompt_lens: str | None = option(
        None, "Tokens of the batch's prompts; 8192*16, 4096@2048 (cached).", metavar="N,N,..."
    )
    workload: str | None = option(None, "A trace: requests with their lengths and times.", is_file=True)
    workload_format: str = option("auto", "How it is written.", choices=("auto", *TraceFormat))
    time_unit: str = option("auto", "What its times count.", choices=("auto", *TimeUnit))
    num_requests: int | None = option(None, "Read only so many of its lines.", metavar="N", above=0)
    prefix_cache: str = option("infinite", "Tokens that its hash_ids find cached.", metavar="N|infinite|off")
    rate: float = option(1.0, "Speed the workload's arrivals up by this.")
    cost_model: str | None = option(None, "Plan with this cost model file instead.", is_file=True)
    tp_size: int | None = option(None, "Keep the tensor-parallel size at this.", above=0)
    ep_size: int | None = option(None, "Keep the groups of ranks that experts are spread over at this.", above=0)
    pp_size: int | None = option(None, "Keep the number of stages at this.", above=0)
    sp_size: int | None = option(None, "Keep the ranks that share the tokens of a stage at this.", above=0)
    sp_kind: str = option("auto", "How they share them.", choices=SP_KINDS)
    virtual_stages: int | None = option(None, "Keep the groups of layers a stage at this.", metavar="V", above=0)
    layer_partition: str | None = option(None, "Keep the layers of each stage (or group) at these.", metavar="N,N,...")
    stage_order: str = option("auto", "Where they stand.", choices=("auto", "loop", "v"))
    topology: str | None = option(None, "JSON: hosts, cards a host, and the links between them.", is_file=True)
    policy: str = option("joint", "fixed:N, gpipe, sglang, ascend, terapipe, dp, joint.")
    compare: bool = option(False, "Plan by every policy too, and print them all.")
    window: str = option("none", "Rounds that may be in flight.", metavar="N|none")
    chunk_multiple: int | None = option(None, "Chunks end on multiples of this. [default: 64; on CUDA 256]")
    max_round_tokens: int | None = option(None, "Most tokens in a round.")
    max_kv_tokens: int | None = option(None, "Most tokens in the KV cache.")
    objective: str = option("makespan", "What is made least.", choices=tuple(Objective))
    max_makespan_increase: str | None = option(
        None,
        f"By how much another objective may lengthen the makespan. [default: {100 * MAX_MAKESPAN_INCREASE:g}%]",
        metavar="P%|none",
    )
    sla_ttft_s: float | None = option(None, "Deadline of every request's TTFT, for sla and lateness.", above=0)
    decode: str = option("elsewhere", "Where the workload's answers are decoded.", choices=("elsewhere", "beside"))
    sla_tpot_s: float | None = option(None, "Limit of every request's TPOT, with --decode beside.", above=0)
    priority: str | None = option(None, "Weights of the workload's classes.", metavar="NAME=WEIGHT,...")
    memory_gib: float | None = option(
        None, "GiB of a card, or of the host of CPU ranks. [default: the hardware's]", above=0
    )
    num_trials: int | None = option(
        None, "Settings of the online planner that are tried on a trace.", flags=("--trials",), metavar="N", above=0
    )
    max_new_tokens: int = option(1, "Tokens to decode; counts in memory.", above=0)
    dtype: str | None = option(None, "float32, bfloat16, w8a16, w8a8, fp8, ... [default: the model's]")
    max_loss: str | None = option(None, "Rise of perplexity that auto allows. [default: 0.5%]", metavar="P%")
    quantize_reports: str | None = option(
        None, "Reports of quantize --json, which tell what precisions lose.", metavar="FILE,...", is_file=True
    )
    device_type: str | None = option(
        None, "[default: cuda where there is one]", flags=("--device",), choices=("cpu", "cuda")
    )
    threads_per_rank: int | None = option(None, "Threads of one rank on a CPU. [default: cores / world size]", above=0)
    hardware_id: int | None = option(
        None, "Plan for this hardware of the database (isochunk db list).", flags=("--hardware",)
    )
    measure: int | None = option(
        None, "Run N plans on this machine and write the best measured one.", metavar="N", above=0
    )
    study: str | None = option(None, "Name of the runs of --measure: go on where it was.", metavar="NAME")
    repeat: int = option(1, "Runs of each measured plan; the median counts.", above=0)
    correct: bool = option(True, "Correct the model by earlier runs. [default: correct]")
    price_per_gpu_hour: float | None = option(None, "Tells the cost a million prompt tokens.", metavar="N", above=0)
    keep: bool = option(True, "Keep the fit and the plan in the database. [default: keep]")
    plot: str | None = option(None, "Draw why, and where else which layout wins.", metavar="FILE.svg", is_file=True)
    output: str | None = option(None, "Write the best plan to this file.", flags=("-o", "--output"), is_file=True)
    db_url: str | None = db_url()

    @property
    def memory_bytes(self) -> int | None:
        """Of `memory_gib`."""
        return None if self.memory_gib is None else int(self.memory_gib * 2**30)

    @property
    def most_loss(self) -> float:
        """Of `max_loss`, as a share."""
        return share("--max-loss", self.max_loss or "0.5%")

    @property
    def most_makespan_increase(self) -> float:
        """Of `max_makespan_increase`, as a share; infinite for none."""
        text = self.max_makespan_increase
        if text is None:
            return MAX_MAKESPAN_INCREASE
        return math.inf if text.strip().lower() == "none" else share("--max-makespan-increase", text, or_word="none")

    def __post_init__(self) -> None:
        check_options(self)
        if self.precision != "auto":
            for flag, value in (("--max-loss", self.max_loss), ("--quantize-reports", self.quantize_reports)):
                if value is not None:
                    raise UserError(flag, value, "goes with --precision auto")
        _ = self.most_loss, self.most_makespan_increase
        if self.max_makespan_increase is not None and self.objective == Objective.MAKESPAN:
            others = ", ".join(each for each in Objective if each is not Objective.MAKESPAN)
            raise UserError("--max-makespan-increase", self.max_makespan_increase, f"goes with --objective {others}")
        if self.cost_model is not None and (self.ep_size or 1) > 1:
            raise UserError("--ep-size", self.ep_size, "a cost model alone knows no experts; give MODEL")
        if self.cost_model is not None and (self.sp_size or 1) > 1:
            raise UserError("--sp-size", self.sp_size, "a cost model alone has no sequence parallelism; give MODEL")
        if self.plot is not None and not self.plot.endswith(".svg"):
            raise UserError("--plot", self.plot, "must end in .svg")
        if self.cost_model is not None and self.plot is not None:
            raise UserError("--plot", self.plot, "a cost model alone has one layout; give MODEL")
        if self.cost_model is not None and self.layer_partition is not None:
            raise UserError("--layer-partition", self.layer_partition, "goes with a MODEL; a cost model has its stages")
        if self.cost_model is not None and self.topology is not None:
            raise UserError("--topology", self.topology, "goes with a MODEL; a cost model has its hops")
        if self.sla_tpot_s is not None and self.decode == "elsewhere":
            raise UserError("--sla-tpot-s", self.sla_tpot_s, "goes with --decode beside")
        if self.decode == "beside" and self.workload is None:
            raise UserError("--decode", self.decode, "goes with --workload")
        if self.priority is not None and self.workload is None:
            raise UserError("--priority", self.priority, "goes with --workload")
        if self.objective in ("sla", "lateness") and self.sla_ttft_s is None and self.workload is None:
            raise UserError("--sla-ttft-s", "missing", f"the objective {self.objective} needs a deadline in seconds")
        if self.num_trials and self.workload is None:
            raise UserError("--trials", self.num_trials, "tries settings on a trace; give --workload")
        if (self.prompt_lens is None) == (self.workload is None):
            raise UserError("--prompt-lens", self.prompt_lens or "missing", "give either --prompt-lens or --workload")
        if self.workload is None:
            given = chosen(self)
            for name in ("workload_format", "time_unit", "num_requests", "prefix_cache", "rate"):
                if name in given:
                    raise UserError(flag_of(self, name), given[name], "goes with --workload")
        if self.study is not None and self.measure is None:
            raise UserError("--study", self.study, "goes with --measure N, the plans to run in all")
        if self.study is not None and not (0 < len(self.study) <= 100 and self.study.isprintable()):
            raise UserError("--study", self.study, "must be printable, at most 100 characters")
        if self.cost_model is not None and self.measure is not None:
            raise UserError("--measure", self.measure, "a cost model alone cannot be run; give MODEL")
        if self.cost_model is not None and self.model is not None:
            raise UserError("--cost-model", self.cost_model, "stands instead of a model; give one of the two")
        if self.precision is not None and self.dtype is not None:
            raise UserError("--precision", self.precision, "says what --dtype says; give one of the two")
        if self.cost_model is None and self.model is None:
            raise UserError("MODEL", "missing", "give a model, or a cost model with --cost-model FILE --pp-size K")


def next_command(options: TuneOptions) -> str:
    """What to type after this: keep the plan, run it, or hand it to an engine."""
    if options.output is None:
        known = {"db_url": None} if options.db_url == os.environ.get(DB_VARIABLE) else {}
        return command_line("tune", options, output="plan.json", **known)
    if options.model is None:
        return shlex.join(["isochunk", "export", options.output, "--engine", "sglang"])
    is_folder = os.sep in options.model or options.model.startswith(".")
    weights = ["--weights", options.model] if is_folder else ["--random-weights"]
    return shlex.join(["isochunk", "run-plan", options.output, *weights])
