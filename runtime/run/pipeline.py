"""A rank's part in the pipeline: takes rounds in order from the stage before, runs them, hands them on."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

from profiler.comm.links.boundary import MessageSizes, make_links
from profiler.comm.links.group import Groups
from profiler.comm.ranks.mark import Doing, Progress
from profiler.kernels.attention import attends_on_device
from profiler.kernels.recording import new_scratch, record
from profiler.sequence.kind import usual_cut
from runtime.job.job import Job
from runtime.job.place import Place
from runtime.run.clock import Clock
from runtime.stage.share import RoundShare
from runtime.stage.stage import Stage
from tuner.plan.memory import MOST_RECORDED
from tuner.plan.plan import Round


class Pipeline:
    """Prefills and decodes on one rank. No rank waits for another but for the data it needs."""

    def __init__(self, job: Job, place: Place, groups: Groups, stage: Stage, clock: Clock, progress: Progress) -> None:
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
        self.links = make_links(groups, sizes, device, stage.dtype)
        stage.scheme.use(self.links.sequence)
        self.inbound, self.outbound, self.back = self.links.inbound, self.links.outbound, self.links.back
        self.source = groups.inbound.peer if groups.inbound else None
        self.last = groups.back.peer if groups.back else None
        # On a card the host is rounds ahead: there `CardMarks` tells where the card is.
        self.marks_here = device.type != "cuda"
        self.recorded: list[Callable[[], torch.Tensor]] = []  # of the plan's rounds, in order
        self.recorded_step: Callable[[], torch.Tensor] | None = None  # of decode

    def warm_up(self) -> None:
        """Build what is built lazily: kernels for the rounds' shapes, connections between the stages."""
        self.stage.warm_up(self.rounds)
        if self.job.max_new_tokens > 1:
            self._compute_step()  # what it writes to the slab, the first step writes again
        most = self.most_rows
        if self.inbound:
            self.inbound.expect([most])
            self.inbound.receive()
            self.inbound.release()
        if self.outbound:
            size = (most, self.job.shape.hidden_size)
            self.outbound.begin()
            place = self.outbound.buffer(0, most)
            zeros = torch.zeros(size, device=self.stage.device, dtype=self.stage.dtype)
            self.outbound.send(zeros if place is None else place.copy_(zeros))
        if self.back and self.place.is_last:
            self.back.send(self.next_ids)
        elif self.back:
            self.back.receive(self.next_ids)
        self.links.drain()

    def record(self) -> None:
        """Make the plan's rounds and a step of decode replayable, once all that runs only once has run."""
        if self.stage.device.type == "cuda":
            torch.cuda.empty_cache()  # recordings keep their scratch memory elsewhere
        scratch = new_scratch(self.stage.device)
        self.recorded = [
            record(partial(self._compute, index, share), self.stage.device, scratch)
            for index, share in enumerate(self.rounds[:MOST_RECORDED])
        ]
        if self.job.max_new_tokens > 1 and attends_on_device(self.stage.device):
            self.recorded_step = record(self._compute_step, self.stage.device, scratch)
            if self.stage.device.type == "cuda":
                self.stage.scheme.step.restart()
                self.recorded_step()  # a graph's first launch also brings it to the card

    def close(self) -> None:
        """Give up the recordings: NCCL's groups are not left while a graph holds their work."""
        self.recorded.clear()
        self.recorded_step = None

    def fill_cache(self) -> None:
        """Run rounds that the plan does not count: cached tokens of its requests."""
        self._begin([share.num_rows for share in self.cached_rounds])
        for index, share in enumerate(self.cached_rounds):
            self._run(partial(self._compute, index, share))
        self.links.drain()

    def prefill(self) -> None:
        """Run the plan's rounds. `next_ids` of the last stage then holds each prompt's next token."""
        rounds = self.rounds
        window = self.job.window or len(rounds)
        self._begin([share.num_rows for share in rounds])
        for index, share in enumerate(rounds):
            self._mark(index, until_s=self.arrival_s(share.chunks))
            if self.place.is_first:
                self._wait_for_arrival(share.chunks)
                if self.back and index >= window:
                    self._wait(Doing.RETURN, self.last)
                    self.back.wait_acknowledged()
            is_recorded = index < len(self.recorded)
            self._run(self.recorded[index] if is_recorded else partial(self._compute, index, share))
            if self.back and self.place.is_last and index + window < len(rounds):
                self.back.acknowledge()
        self.links.drain()

    def decode(self, num_steps: int) -> torch.Tensor:
        """Run `num_steps` steps of one token of every request -> on the last stage, all new ids [1 + num_steps, R]."""
        chosen = [self.next_ids.clone()]
        self.stage.scheme.step.restart()
        for step in range(num_steps):
            self._mark(len(self.job.rounds) + step)
            if self.back and self.place.is_last:
                self.back.send(self.next_ids)
            elif self.back:
                self._wait(Doing.RETURN, self.last)
                self.back.receive(self.next_ids)
            # One receive at a time: it waits on the device for what this rank has yet to cause, and CUDA may wait for
            # the device when it loads a kernel.
            self._begin([len(self.job.requests)])
            self._run(self.recorded_step or self._compute_step)
            chosen.append(self.next_ids.clone())
        self.links.drain()
        return torch.stack(chosen)

    def arrival_s(self, chunks: Round) -> float:
        """When the last request of a round arrives, on the host's clock."""
        return self.clock.origin_s + max(self.job.requests[chunk.request].arrival_s for chunk in chunks)

    def _begin(self, tokens: Sequence[int]) -> None:
        """Rounds of `tokens` rows each follow, counted from 0."""
        if self.inbound:
            self.inbound.expect(tokens)
        if self.outbound:
            self.outbound.begin()

    def _run(self, compute: Callable[[], torch.Tensor]) -> None:
        if self.inbound:
            self._wait(Doing.RECEIVE, self.source)
            self.inbound.receive()
        if self.outbound:
            self.outbound.reserve()
        if self.marks_here:
            self.progress.work()
        self.clock.start()
        hidden = compute()
        self.clock.finish()
        if self.inbound:
            self.inbound.release()
        if self.outbound:
            self.outbound.send(hidden)

    def _compute(self, index: int, share: RoundShare) -> torch.Tensor:
        """Everything of a round that the device does, between its hidden states' arrival and their departure."""
        rows = share.num_rows
        received = self.inbound.buffer(index, rows) if self.inbound else self.stage.embed(self._token_ids(share))
        hidden = self.stage.forward(share, received)
        if self.place.is_last:
            self._choose(share, hidden)
        return self._lay_out(index, hidden)

    def _compute_step(self) -> torch.Tensor:
        """Everything of a decode step that the device does: the same work on the same memory each time.

        Each step is announced by itself, so it is always round 0 of the links.
        """
        received = self.inbound.buffer(0, len(self.job.requests)) if self.inbound else self.stage.embed(self.next_ids)
        hidden = self.stage.forward_step(received)
        if self.place.is_last:
            self.next_ids.copy_(self.stage.next_ids(hidden))
        return self._lay_out(0, hidden)

    def _lay_out(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """Put a round's hidden states where the next stage expects them to be sent from."""
        if self.outbound is None:
            return self.next_ids  # nothing leaves: a recording would hold on to the hidden states
        place = self.outbound.buffer(index, hidden.shape[0])
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
