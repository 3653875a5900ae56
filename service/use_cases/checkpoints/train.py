"""What `isochunk train` does: reads plan, weights and text, trains on the plan's ranks, and leaves a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from db.errors import UserError
from service.use_cases.checkpoints.step_prediction import StepPrediction, predict
from service.use_cases.options import check_options, db_url, option

if TYPE_CHECKING:
    from runtime.train.recipe import TrainingRecipe
    from runtime.train.train import TrainResult
    from tuner.plan.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOptions:
    """Options of `isochunk train`. Raises UserError for values that are not allowed, alone or together."""

    plan: str | None = option(None, "Plan file: its requests are the sequences of a step.", flags=("PLAN",))
    weights: str | None = option(None, "Folder with a config.json and safetensors.", metavar="DIR")
    data: str | None = option(None, "Text, or JSONL with text or token_ids a line.", is_file=True)
    output: str | None = option(None, "Folder to write, not there yet.", flags=("-o", "--output"), metavar="DIR")
    state: str | None = option(None, "Folder of checkpoints to resume from. [default: OUTPUT.state]", metavar="DIR")
    teacher: str | None = option(None, "Checkpoint whose distribution is learned.", metavar="DIR")
    steps: int = option(100, "Updates.", above=0)
    learning_rate: float = option(1e-4, "Its height; half a cosine leads down from there.", above=0)
    warmup_steps: int = option(0, "Steps until that height.")
    weight_decay: float = option(0.01, "Of matrices; biases and norms do not decay.")
    clip_norm: float = option(1.0, "Global norm at which gradients are clipped.", above=0)
    accumulate: int = option(1, "Passes over the plan a step, each with other sequences.", above=0)
    precision: str | None = option(None, "float32, bfloat16, float16, or 8 bits rounded so. [default: the plan's]")
    loss_scale: float | None = option(None, "Fixed loss scale. [default: dynamic in float16, else 1]", above=0)
    recompute: str = option(
        "none", "What is computed again instead of kept.", choices=("none", "linear", "layer", "round")
    )
    order: str = option("1f1b", "When backward rounds begin.", choices=("1f1b", "all-forward"))
    distill_weight: float = option(1.0, "Of the teacher against the text, 0 to 1.")
    temperature: float = option(1.0, "Of both distributions when they are compared.", above=0)
    seed: int = option(0, "Of the order of the sequences.")
    save_every: int = option(100, "Steps between checkpoints.", above=0)
    threads_per_rank: int | None = option(None, "CPU threads of a rank. [default: the plan's, or a share]", above=0)
    device_type: str | None = option(
        None, "[default: cuda where there is one]", flags=("--device",), choices=("cpu", "cuda")
    )
    db_url: str | None = db_url()

    def __post_init__(self) -> None:
        check_options(self)
        for name, flag in (("plan", "PLAN"), ("weights", "--weights"), ("data", "--data"), ("output", "--output")):
            if getattr(self, name) is None:
                raise UserError(flag, "missing", "is needed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """A training, beside what the profile says of its steps."""

    result: TrainResult
    prediction: StepPrediction

    @property
    def predicted_s(self) -> float | None:
        """Of a step."""
        return None if self.prediction.step is None else self.prediction.step.seconds

    @property
    def mfu(self) -> tuple[float, str] | None:
        """6ND and attention, forward and backward, and of what: the published peak, or the fastest product measured."""
        result, fastest = self.result, self.prediction.fastest_flops
        if result.mfu is not None:
            return result.mfu, "the published peak"
        return (min(1.0, result.rank_flops / fastest), "the fastest product measured") if fastest else None

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        mfu = {} if self.mfu is None else {"mfu": self.mfu[0], "mfu_of": self.mfu[1]}
        predicted = {"predicted_step_s": self.predicted_s, "not_predicted": self.prediction.why}
        return self.result.to_json() | mfu | predicted


def train(options: TrainOptions, *, logs: bool) -> Training:
    """Train as the options say; `logs`: a line a step on standard error."""
    from profiler.hardware.device import check_device_type, default_device_type, default_num_threads
    from runtime.quantize.texts import read_sequences
    from runtime.run.preparation import check_counts, model_shape
    from runtime.run.prompts import Tokenizer
    from runtime.train.train import train as run
    from tuner.plan.plan import load_plan

    plan = load_plan(Path(options.plan or ""))
    weights = Path(options.weights or "")
    recipe = recipe_of(options, plan)
    device_type = options.device_type or default_device_type()
    check_device_type(device_type)
    num_threads = options.threads_per_rank or plan.threads_per_rank
    if num_threads is None:
        num_threads = default_num_threads(device_type, plan.parallel.world_size)
    check_counts(max_new_tokens=1, repeat=1, num_threads=num_threads)
    shape = model_shape(plan.model, weights)
    prediction = predict(
        plan, recipe, shape, device_type=device_type, num_threads=num_threads, db_url=options.db_url
    )  # fmt: skip
    result = run(
        plan,
        recipe,
        weights=weights,
        sequences=read_sequences(Path(options.data or ""), Tokenizer(weights), shape, field="--data"),
        output=Path(options.output or ""),
        state=Path(options.state) if options.state else None,
        teacher=Path(options.teacher) if options.teacher else None,
        device_type=device_type,
        num_threads=num_threads,
        logs=logs,
    )
    return Training(result=result, prediction=prediction)


def recipe_of(options: TrainOptions, plan: Plan) -> TrainingRecipe:
    """How the options say to train."""
    from runtime.train.recipe import TrainingRecipe
    from tuner.training.order import Order, Recompute

    return TrainingRecipe(
        steps=options.steps,
        learning_rate=options.learning_rate,
        warmup_steps=options.warmup_steps,
        weight_decay=options.weight_decay,
        clip_norm=options.clip_norm,
        accumulate=options.accumulate,
        precision=options.precision or plan.precision,
        loss_scale=options.loss_scale,
        recompute=Recompute(options.recompute),
        order=Order(options.order),
        distill_weight=options.distill_weight,
        temperature=options.temperature,
        seed=options.seed,
        save_every=options.save_every,
    )
