"""One rank's whole training: load or resume, run each step's tasks in order, update, save, report."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from profiler.comm.links.group import make_groups
from profiler.comm.ranks.mark import Doing, Phase
from profiler.comm.ranks.rank import RankContext
from profiler.model import ModelShape
from runtime.job.place import Place, mesh_of
from runtime.train.attention import LayerCache
from runtime.train.data import TokenStream
from runtime.train.exchange import Way, make_ways
from runtime.train.head import LearningTarget, TrainingHead, loss_and_grads
from runtime.train.optimizer import LossScale, Optimizer
from runtime.train.recipe import TrainingRecipe
from runtime.train.saving import folder_of, read_notes, read_state, save
from runtime.train.stage import KeptRound, TrainingRound, TrainingStage
from tuner.plan.plan import Parallel, Request, Round
from tuner.training.order import TrainingTask, Unit, stage_tasks, step_units

LOG = "steps.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class Teacher:
    """The model whose distribution is learned, spread over the same ranks."""

    shape: ModelShape
    weights: Path
    parallel: Parallel


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainJob:
    """The job of every rank of a training."""

    shape: ModelShape
    weights: Path | None  # None: random ones, for measurements
    parallel: Parallel
    requests: tuple[Request, ...]
    rounds: tuple[Round, ...]
    recipe: TrainingRecipe
    stream: TokenStream
    state: Path  # checkpoints to resume from
    resume: Path | None  # one of them
    teacher: Teacher | None = None
    until_step: int | None = None  # stop before the recipe's end
    logs: bool = False
    saves: bool = True

    @property
    def num_targets(self) -> int:
        """Tokens of a step that are predicted."""
        return self.recipe.accumulate * sum(request.prompt_tokens - 1 for request in self.requests)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """What one step came to. loss: of a token; norm: of all gradients, before it was clipped."""

    step: int
    loss: float
    cross_entropy: float
    rate: float
    norm: float
    scale: float
    is_skipped: bool
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainReport:
    """What a rank reports."""

    records: tuple[StepRecord, ...]
    reserved_bytes: int | None  # of the card at most; None on a CPU
    allocated_bytes: int | None
    folder: Path | None  # the last checkpoint
    gradients: dict[str, list[float]] | None = None


@dataclass(slots=True)
class _Batch:
    """Caches of the sequences of a batch, and what waits for its backward."""

    starts: list[int]
    caches: Sequence[LayerCache]
    teacher_caches: Sequence[LayerCache]
    kept: dict[int, KeptRound] = field(default_factory=dict)


def train_rank(context: RankContext, job: TrainJob) -> TrainReport:
    """Train as one of the ranks; the function that `profiler.comm.ranks.launch.run_ranks` starts on each."""
    mesh = mesh_of(job.parallel)
    with ExitStack() as stack:
        groups = stack.enter_context(make_groups(mesh, context.rank, context.device))
        trainer = Trainer(context, job, groups, stack.enter_context(make_ways(mesh, context.rank)))
        return trainer.run()


class Trainer:
    """A rank in training."""

    def __init__(self, context: RankContext, job: TrainJob, groups: Any, ways: Any) -> None:
        self.context, self.job, self.groups, self.ways = context, job, groups, ways
        self.place = Place.of(context.rank, job.parallel)
        recipe, device = job.recipe, context.device
        context.progress.enter(Phase.LOAD)
        formats = recipe.formats
        dtype, rounded = formats.activations.torch_dtype, formats.linears
        compiles = recipe.compiles
        if compiles is None:
            compiles = device.type == "cuda" and job.parallel.tp_size == 1 and rounded is None
        self.compiles = compiles
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.stage = TrainingStage(
            job.shape, job.weights, self.place, groups, rounded=rounded, recompute=recipe.recompute, compiles=compiles,
            **options,
        )  # fmt: skip
        self.optimizer = Optimizer(
            self.stage.parameters, recipe, is_first_tp=self.place.tp_rank == 0, everyone=groups.everyone
        )
        self.stage.keep_grads()
        self.teacher = None
        if job.teacher is not None:
            place = Place.of(context.rank, job.teacher.parallel)
            self.teacher = TrainingStage(
                job.teacher.shape, job.teacher.weights, place, groups, is_trained=False, **options
            )
        self.scale = LossScale.of(recipe)
        self.records: list[StepRecord] = []
        self.folder: Path | None = None
        if job.resume is not None:
            self._restore(job.resume)
        self.stage.share_tied(ways.ends)
        units = step_units(job.rounds, recipe.accumulate)
        self.tasks = list(stage_tasks(units, stage=self.place.stage, pp_size=job.parallel.pp_size, order=recipe.order))
        self.last_of_batch = {unit.batch: min(u.index for u in units if u.batch == unit.batch) for unit in units}
        self.requests_of = {
            unit.batch: sorted({c.request for u in units if u.batch == unit.batch for c in job.rounds[u.round_index]})
            for unit in units
        }
        self.batches: dict[int, _Batch] = {}
        self.sums = torch.zeros(2, device=device, dtype=torch.float64)

    def run(self) -> TrainReport:
        """All steps that are left."""
        recipe, progress = self.job.recipe, self.context.progress
        end = min(recipe.steps, self.job.until_step or recipe.steps)
        progress.enter(Phase.RUN)
        for step in range(len(self.records), end):
            self.records.append(self._step(step))
            self._log()
            if self.job.saves and ((step + 1) % recipe.save_every == 0 or step + 1 == end):
                progress.enter(Phase.LOAD)
                self._save(step + 1)
                progress.enter(Phase.RUN)
        is_cuda = self.context.device.type == "cuda"
        return TrainReport(
            records=tuple(self.records),
            reserved_bytes=torch.cuda.max_memory_reserved() if is_cuda else None,
            allocated_bytes=torch.cuda.max_memory_allocated() if is_cuda else None,
            folder=self.folder,
        )

    def _step(self, step: int) -> StepRecord:
        started = time.perf_counter()
        self.sums.zero_()
        self.compute_grads(step)
        rate, scale = self.job.recipe.rate(step), self.scale.value
        self.context.progress.wait(Doing.MEET)
        skipped = self.scale.skipped_steps
        norm = self.optimizer.step(rate, self.scale)
        self.stage.share_tied(self.ways.ends)
        sums = self.sums.cpu() if self.place.tp_rank == 0 else torch.zeros(2, dtype=torch.float64)
        dist.all_reduce(sums, group=self.groups.everyone)
        loss, cross_entropy = (sums / self.job.num_targets).tolist()
        return StepRecord(
            step=step, loss=loss, cross_entropy=cross_entropy, rate=rate, norm=norm, scale=scale,
            is_skipped=self.scale.skipped_steps > skipped, seconds=time.perf_counter() - started,
        )  # fmt: skip

    def compute_grads(self, step: int) -> None:
        """All tasks of a step: gradients of the scaled loss stand in the parameters then."""
        self.stage.begin_step()
        for task in self.tasks:
            self.context.progress.mark(self.place.stage, task.unit.index)
            self._run(task, step)
        self.ways.flush()
        self.stage.sum_shared()
        self.stage.join_tied(self.ways.ends)

    def _run(self, task: TrainingTask, step: int) -> None:
        unit = task.unit
        if not task.is_backward:
            self._forward(unit, step)
            return
        batch = self.batches[unit.batch]
        kept = batch.kept.pop(unit.index)
        outer = kept.outer
        if outer is None:
            outer = self._receive(self.ways.from_next, kept.inputs, self.stage)
        kept.outer = None
        grad = self.stage.backward(kept, outer)
        if grad is not None:
            self.ways.to_before.send(grad)
        if unit.index == self.last_of_batch[unit.batch]:
            del self.batches[unit.batch]

    def _forward(self, unit: Unit, step: int) -> None:
        job, stage, chunks = self.job, self.stage, self.job.rounds[unit.round_index]
        batch = self.batches.get(unit.batch) or self._begin_batch(unit.batch)
        inputs = stage.round_inputs(chunks, batch.starts)
        ids, targets = self._tokens(unit, step)
        entered = stage.embed(ids) if self.place.is_first else self._receive(self.ways.from_before, inputs, stage)
        if not self.place.is_first:
            entered.requires_grad_(True)
        kept = stage.forward(entered, inputs, batch.caches)
        output, teacher = kept.output, self._teach(unit, ids, batch)
        assert output is not None
        if not self.place.is_last:
            self.ways.to_next.send(output)
            if teacher is not None:
                self.ways.to_next.send(teacher[1])
        else:
            recipe, matrix = job.recipe, stage.head_matrix
            assert matrix is not None and matrix.grads is not None
            kept.outer, sums = loss_and_grads(
                stage.head,
                output.detach(),
                targets,
                target=LearningTarget(distill_weight=recipe.distill_weight, temperature=recipe.temperature),
                scale=self.scale.value / job.num_targets,
                weight_grads=matrix.grads,
                teacher=teacher,
                compiles=self.compiles,
            )
            self.sums += sums
        if stage.recompute == "round":
            kept.output = None
        batch.kept[unit.index] = kept

    @torch.no_grad()
    def _teach(self, unit: Unit, ids: torch.Tensor, batch: _Batch) -> tuple[TrainingHead, torch.Tensor] | None:
        """The teacher's hidden states of a round after this stage, and its head where it is the last."""
        teacher = self.teacher
        if teacher is None:
            return None
        inputs = teacher.round_inputs(self.job.rounds[unit.round_index], batch.starts)
        entered = teacher.embed(ids) if self.place.is_first else self._receive(self.ways.from_before, inputs, teacher)
        hidden = teacher.run(entered, inputs, batch.teacher_caches)
        return (teacher.head if self.place.is_last else TrainingHead(weight=hidden, first_id=0)), hidden

    def _receive(self, way: Way, inputs: TrainingRound, stage: TrainingStage) -> torch.Tensor:
        self.context.progress.wait(Doing.RECEIVE, way.peer)
        received = way.receive((inputs.num_rows, stage.shape.hidden_size), stage.dtype, self.context.device)
        self.context.progress.work()
        return received

    def _begin_batch(self, number: int) -> _Batch:
        starts, row = [0] * len(self.job.requests), 0
        for request in self.requests_of[number]:
            starts[request] = row
            row += self.job.requests[request].prompt_tokens
        caches = self.teacher.make_caches(row) if self.teacher is not None else []
        self.batches[number] = _Batch(starts, self.stage.make_caches(row), caches)
        return self.batches[number]

    def _tokens(self, unit: Unit, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids of a round's tokens, and of those after them: -1 after a sequence's last."""
        job, ids, targets = self.job, [], []
        first = (step * job.recipe.accumulate + unit.repeat) * len(job.requests)
        for chunk in job.rounds[unit.round_index]:
            whole = job.stream.sequence(first + chunk.request, job.requests[chunk.request].prompt_tokens)
            ids.append(whole[chunk.start : chunk.end])
            after = whole[chunk.start + 1 : chunk.end + 1]
            targets.append(torch.nn.functional.pad(after, (0, chunk.tokens - len(after)), value=-1))
        return torch.cat(ids).to(self.context.device), torch.cat(targets).to(self.context.device)

    def _log(self) -> None:
        record = self.records[-1]
        if not self.job.logs or self.context.rank != 0:
            return
        tokens = self.job.recipe.accumulate * sum(request.prompt_tokens for request in self.job.requests)
        print(
            f"step {record.step + 1} of {self.job.recipe.steps}: loss {record.loss:.4f}, norm {record.norm:.3f}, "
            f"{tokens / record.seconds:.0f} tokens/s{', skipped' if record.is_skipped else ''}",
            file=sys.stderr, flush=True,
        )  # fmt: skip

    def _save(self, step: int) -> None:
        notes = {
            "step": step,
            "recipe": asdict(self.job.recipe),
            "layout": self.job.parallel.to_json(),
            "data_seed": self.job.stream.seed,
            "scale": asdict(self.scale),
            "records": [asdict(record) for record in self.records],
        }
        # Nothing is drawn at random within a step; who draws later goes on where it was.
        state = self.optimizer.state() | {"random": torch.get_rng_state()}
        assert self.job.weights is not None
        self.folder = folder_of(self.job.state, step)
        save(
            self.folder,
            self.job.weights,
            rank=self.context.rank,
            stage=self.place.stage,
            is_first_tp=self.place.tp_rank == 0,
            tensor_group=self.groups.tensor.group,
            everyone=self.groups.everyone,
            parameters=self.stage.parameters,
            state=state,
            dtype=getattr(torch, self.job.shape.dtype),
            notes=notes,
        )

    def _restore(self, folder: Path) -> None:
        notes, state = read_notes(folder), read_state(folder, self.context.rank)
        self.optimizer.restore(state)
        torch.set_rng_state(state["random"])
        self.scale = LossScale(**notes["scale"])
        self.records = [StepRecord(**record) for record in notes["records"]]
        self.folder = folder
