"""A rank's part of the pipeline: receives hidden states, runs its tasks in order, and sends the results on."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

from profiler.comm.links.boundary import MessageSizes, make_links
from profiler.comm.links.group import Groups
from profiler.comm.ranks.mark import Doing, Progress
from profiler.kernels.attention import attends_on_device
from profiler.kernels.recording import Scratch, new_scratch, record
from profiler.sequence.kind import usual_cut
from runtime.job.job import RunJob
from runtime.job.place import Place
from runtime.run.clock import RoundClock
from runtime.run.task import RoundTask, StageTasks, tasks_of
from runtime.stage.share import RoundShare
from runtime.stage.stage import Stage
from tuner.plan.memory import MOST_RECORDED
from tuner.plan.plan import Round


class Pipeline:
    """Prefills and decodes on one rank. A rank waits for others only for the data it needs."""

    def __init__(
        self, job: RunJob, place: Place, groups: Groups, stage: Stage, clock: RoundClock, progress: Progress
    ) -> None:
        self.job, self.place, self.stage, self.clock, self.progress = job, place, stage, clock, progress
        device = stage.device
        self.prompts = [torch.tensor(ids, device=device) for ids in job.prompts] if place.is_first else []
        self.next_ids = torch.zeros(len(job.requests), device=device, dtype=torch.int64)  # of each request
        # Decode hands on one row of every request.
        self.rounds = [stage.scheme.share(*one) for one in zip(job.rounds, job.round_cuts, strict=True)]
        cut = usual_cut(job.parallel.sp_kind)
        self.cached_rounds = [stage.scheme.share(chunks, cut) for chunks in job.cached_rounds]
        self.most_rows = max(share.num_rows for share in [*self.rounds, *self.cached_rounds])
        sizes = MessageSizes(
            max_tokens=max(self.most_rows, len(job.requests)),
            hidden_size=job.shape.hidden_size,
            num_requests=len(job.requests),
            gathered=stage.scheme.gathered_numbers(self.most_rows),
        )
        parallel, stage_index = job.parallel, place.stage
        self.tasks = tasks_of(parallel, stage_index, len(self.rounds), job.window)
        self.cached_tasks = tasks_of(parallel, stage_index, len(self.cached_rounds))
        self.step_tasks = tasks_of(parallel, stage_index, 1)
        self.links = make_links(groups, sizes, device, stage.dtype)
        stage.scheme.use(self.links.sequence)
        self.inbound, self.outbound, self.back = self.links.inbound, self.links.outbound, self.links.back
        self.hand_offs = groups.hand_offs
        self.sources = {stage: pair.peer for stage, pair in groups.inbound.items()}
        self.last = groups.back.peer if groups.back else None
        # Where a round stays on the rank from one group to the next.
        stays = any(task.target is None and task.group < parallel.num_groups - 1 for task in self.step_tasks.tasks)
        fold_rows = sizes.max_tokens if stays else 0
        self.fold = torch.zeros(fold_rows, sizes.hidden_size, device=device, dtype=stage.dtype)
        # On a card the host is rounds ahead: there `CardMarks` tells where the card is.
        self.marks_here = device.type != "cuda"
        self.recorded: dict[tuple[int, int], Callable[[], torch.Tensor]] = {}  # of the plan's tasks, by round and group
        self.recorded_steps: dict[int, Callable[[], torch.Tensor]] = {}  # of decode, by group

    def warm_up(self) -> None:
        """Trigger lazy initialisation: kernels for the rounds' shapes, connections between the stages."""
        self.stage.warm_up(self.rounds)
        if self.job.max_new_tokens > 1:
            for task in self.step_tasks.tasks:
                self._compute_step(task)  # what it writes to the slab, the first step writes again
        most, here = self.most_rows, self.place.stage
        for source, target in self.hand_offs:  # one after the other: around a loop all would wait for one another
            if target == here:
                self.inbound[source].expect([most])
                self.inbound[source].receive()
                self.inbound[source].release()
            elif source == here:
                size = (most, self.job.shape.hidden_size)
                self.outbound[target].begin()
                place = self.outbound[target].buffer(0, most)
                zeros = torch.zeros(size, device=self.stage.device, dtype=self.stage.dtype)
                self.outbound[target].send(zeros if place is None else place.copy_(zeros))
        if self.back and self.place.is_last:
            self.back.send(self.next_ids)
        elif self.back:
            self.back.receive(self.next_ids)
        self.links.drain()

    def record(self) -> None:
        """Record the plan's rounds and a decode step as graphs, after all one-time work is done."""
        if not self.stage.is_recordable:
            return
        if self.stage.device.type == "cuda":
            torch.cuda.empty_cache()  # recordings keep their scratch memory elsewhere
        scratch = new_scratch(self.stage.device)
        self.recorded = {
            (task.round_index, task.group): self._recorded(task, scratch)
            for task in self.tasks.tasks
            if task.round_index < MOST_RECORDED
        }
        if self.job.max_new_tokens > 1 and self.stage.is_step_recordable and attends_on_device(self.stage.device):
            self.recorded_steps = {
                task.group: record(partial(self._compute_step, task), self.stage.device, scratch)
                for task in self.step_tasks.tasks
            }
            if self.stage.device.type == "cuda":
                self.stage.scheme.step.restart()
                for run_step in self.recorded_steps.values():
                    run_step()  # a graph's first launch also brings it to the card

    def _recorded(self, task: RoundTask, scratch: Scratch) -> Callable[[], torch.Tensor]:
        share = self.rounds[task.round_index]
        replay = record(partial(self._compute, task, share), self.stage.device, scratch)

        def run() -> torch.Tensor:
            hidden = replay()
            self.stage.replayed(share)
            return hidden

        return run

    def middle_round(self) -> Callable[[], torch.Tensor] | None:
        """The recording in the middle of the plan, without its hand-offs; None where nothing is recorded."""
        recorded = list(self.recorded.values())
        return recorded[len(recorded) // 2] if recorded else None

    def close(self) -> None:
        """Drop the recordings: a NCCL group cannot be left while a graph holds its work."""
        self.recorded.clear()
        self.recorded_steps.clear()

    def fill_cache(self) -> None:
        """Run rounds that the plan does not count: cached tokens of its requests."""
        shares = self.cached_rounds
        self._begin(self.cached_tasks, [share.num_rows for share in shares])
        for number, task in enumerate(self.cached_tasks.tasks):
            self._run(number, task, partial(self._compute, task, shares[task.round_index]))
        self.links.drain()

    def prefill(self) -> None:
        """Run the plan's rounds. `next_ids` of the last stage then holds each prompt's next token."""
        rounds, last_group = self.rounds, self.job.parallel.num_groups - 1
        window = self.job.window or len(rounds)
        self._begin(self.tasks, [share.num_rows for share in rounds])
        for number, task in enumerate(self.tasks.tasks):
            index = task.round_index
            share = rounds[index]
            self._mark(index, until_s=self.arrival_s(share.chunks))
            if task.group == 0:
                self._wait_for_arrival(share.chunks)
                if self.back and index >= window:
                    self._wait(Doing.RETURN, self.last)
                    self.back.wait_acknowledged()
            recorded = self.recorded.get((index, task.group))
            self._run(number, task, recorded or partial(self._compute, task, share))
            if self.back and task.group == last_group and index + window < len(rounds):
                self.back.acknowledge()
        self.links.drain()

    def decode(self, num_steps: int) -> torch.Tensor:
        """Run `num_steps` steps of one token of every request -> on the last stage, all new ids [1 + num_steps, R].

        A step is one more round: it passes all groups before the next one begins.
        """
        chosen = [self.next_ids.clone()]
        self.stage.scheme.step.restart()
        for step in range(num_steps):
            self._mark(len(self.job.rounds) + step)
            if self.back and self.place.is_last:
                self.back.send(self.next_ids)
            elif self.back:
                self._wait(Doing.RETURN, self.last)
                self.back.receive(self.next_ids)
            # Only this step's receives: they wait on the device for what this rank has yet to cause, and CUDA may wait
            # for the device when it loads a kernel.
            self._begin(self.step_tasks, [len(self.job.requests)])
            for number, task in enumerate(self.step_tasks.tasks):
                self._run(number, task, self.recorded_steps.get(task.group) or partial(self._compute_step, task))
            chosen.append(self.next_ids.clone())
        self.links.drain()
        return torch.stack(chosen)

    def task_at(self, number: int, *, is_decoding: bool) -> tuple[int, RoundTask]:
        """The round (steps counted after the plan's rounds) and the task of the `number`-th work of a pass; after the
        last one the first of what follows."""
        rounds, tasks = len(self.job.rounds), self.step_tasks.tasks if is_decoding else self.tasks.tasks
        turns, place = divmod(number, len(tasks))
        return (rounds + turns if is_decoding or turns else tasks[place].round_index), tasks[place]

    def arrival_s(self, chunks: Round) -> float:
        """When the last request of a round arrives, on the host's clock."""
        return self.clock.origin_s + max(self.job.requests[chunk.request].arrival_s for chunk in chunks)

    def _begin(self, tasks: StageTasks, num_rows: Sequence[int]) -> None:
        """A pass over rounds of so many rows each begins; messages are counted from 0."""
        for source, inbound in self.inbound.items():
            announced = tasks.announced.get(source, [])
            inbound.expect([num_rows[one.round_index] for one in announced], [one.after for one in announced])
        for outbound in self.outbound.values():
            outbound.begin()

    def _run(self, number: int, task: RoundTask, compute: Callable[[], torch.Tensor]) -> None:
        """Run the `number`-th task of a pass."""
        inbound = outbound = None
        if task.source is not None:
            inbound = self.inbound[task.source]
            self._wait(Doing.RECEIVE, self.sources[task.source])
            inbound.receive()
        if task.target is not None:
            outbound = self.outbound[task.target]
            outbound.reserve()
        if self.marks_here:
            self.progress.work()
        self.clock.start()
        hidden = compute()
        self.clock.finish()
        if inbound:
            inbound.release()
        if outbound:
            outbound.send(hidden)
        for each in self.inbound.values():
            each.queued(number + 1)

    def _compute(self, task: RoundTask, share: RoundShare) -> torch.Tensor:
        """Everything of a task that the device does, between its hidden states' arrival and their departure."""
        received = self._received(task, share.num_rows)
        if received is None:
            received = self.stage.embed(self._token_ids(share))
        hidden = self.stage.forward(share, received, self.place.layers_of(task.group))
        if self._is_last(task):
            self._choose(share, hidden)
        return self._lay_out(task, hidden)

    def _compute_step(self, task: RoundTask) -> torch.Tensor:
        """Everything of a decode step in one group that the device does: the same work on the same memory each time.

        Each step is announced by itself, so its messages are always the first of the links.
        """
        received = self._received(task, len(self.job.requests))
        if received is None:
            received = self.stage.embed(self.next_ids)
        hidden = self.stage.forward_step(received, self.place.layers_of(task.group))
        if self._is_last(task):
            self.next_ids.copy_(self.stage.next_ids(hidden))
        return self._lay_out(task, hidden)

    def _is_last(self, task: RoundTask) -> bool:
        return task.group == self.job.parallel.num_groups - 1

    def _received(self, task: RoundTask, rows: int) -> torch.Tensor | None:
        """The buffer with a task's input hidden states, [rows, hidden]; None in the first group."""
        if task.source is not None:
            return self.inbound[task.source].buffer(task.received, rows)
        return self.fold[:rows] if task.group else None

    def _lay_out(self, task: RoundTask, hidden: torch.Tensor) -> torch.Tensor:
        """Copy a task's hidden states to the send buffer, or to the input of the next group on this rank."""
        if self._is_last(task):
            return self.next_ids  # nothing leaves: a recording would hold on to the hidden states
        if task.target is None:
            return self.fold[: hidden.shape[0]].copy_(hidden)
        place = self.outbound[task.target].buffer(task.sent, hidden.shape[0])
        return hidden if place is None else place.copy_(hidden)

    def _token_ids(self, share: RoundShare) -> torch.Tensor:
        """Of this rank's rows; 0 for padding."""
        ids = [self.prompts[chunk.request][chunk.start : chunk.end] for chunk in share.token_ranges()]
        if share.padding:
            ids.append(torch.zeros(share.padding, device=self.stage.device, dtype=torch.int64))
        return torch.cat(ids)

    def _choose(self, share: RoundShare, hidden: torch.Tensor) -> None:
        requests = self.stage.final_requests(share)
        if requests:
            ids = self.stage.next_ids(self.stage.final_hidden(share, hidden))
            for index, request in enumerate(requests):
                self.next_ids[request] = ids[index]  # a copy on the device: no index travels to it

    def _wait_for_arrival(self, chunks: Round) -> None:
        wait_s = self.arrival_s(chunks) - time.perf_counter()
        if wait_s > 0.0:
            self._wait(Doing.ARRIVAL, None)
            time.sleep(wait_s)

    def _mark(self, round_index: int, *, until_s: float = 0.0) -> None:
        if self.marks_here:
            self.progress.mark(self.place.stage, round_index, until_s=until_s)

    def _wait(self, doing: Doing, peer: int | None) -> None:
        if self.marks_here:
            self.progress.wait(doing, peer)
