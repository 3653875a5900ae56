"""What a link's traffic costs the products beside it on two cards: NCCL's kernels against copies into peer memory.

torchrun --nproc-per-node 2 -m benchmarks.gpu_links
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory
import torch.nn.functional as F

from profiler.comm.links.group import HostGroup
from profiler.comm.links.peer_memory import StreamQueue
from profiler.measure.operations.collectives import PeerMessages
from service.cli.output import print_table

TOKENS, HIDDEN, FFN = 1024, 4096, 14336  # a chunk of Llama-3-8B
REPEATS, WARM_UP = 60, 20
ROWS = (64, 1024, 4096, 16384)


def elapsed_us(work: Callable[[], object], repeats: int) -> float:
    """Mean microseconds of `work` on this card, while whatever is queued on other streams goes on."""
    start, finish = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        work()
    finish.record()
    finish.synchronize()
    return float(start.elapsed_time(finish)) / repeats * 1e3


def main() -> None:
    """Measure on both ranks and print on the first."""
    rank = int(os.environ["RANK"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl")
    host = dist.new_group(backend="gloo")
    options = dist.ProcessGroupNCCL.Options()
    options.config.min_ctas, options.config.max_ctas = 1, 2
    groups = {"NCCL": dist.new_group([0, 1]), "NCCL, two blocks": dist.new_group([0, 1], pg_options=options)}
    messages_to_peer = PeerMessages.of(
        HostGroup(ranks=(0, 1), group=host), 1 - rank, count=max(ROWS) * HIDDEN, device=device, dtype=torch.bfloat16
    )
    hidden = torch.randn(max(ROWS), HIDDEN, device=device, dtype=torch.bfloat16)
    up, down = (torch.randn(*size, device=device, dtype=torch.bfloat16) for size in ((2 * FFN, HIDDEN), (HIDDEN, FFN)))
    middle = torch.randn(TOKENS, FFN, device=device, dtype=torch.bfloat16)

    def products() -> None:
        F.linear(hidden[:TOKENS], up)
        F.linear(middle, down)

    def there_and_back(group: dist.ProcessGroup, rows: int) -> None:
        order = (dist.send, dist.recv) if rank == 0 else (dist.recv, dist.send)
        for step in order:
            step(hidden[:rows], 1 - rank, group=group)

    def ring_there_and_back(rows: int) -> None:
        if rank == 0:
            messages_to_peer.push(rows * HIDDEN)
        messages_to_peer.take()
        if rank == 1:
            messages_to_peer.push(rows * HIDDEN)

    messages: list[list[object]] = []
    for rows in ROWS:
        times = []
        for group in groups.values():
            there_and_back(group, rows)
            times.append(elapsed_us(partial(there_and_back, group, rows), 10) / 2)
        ring_there_and_back(rows)
        dist.barrier(host)
        times.append(elapsed_us(partial(ring_there_and_back, rows), 10) / 2)
        messages.append([rows * HIDDEN * 2 / 2**20, *times])
    elapsed_us(products, WARM_UP)
    beside: list[list[object]] = [["nothing", elapsed_us(products, REPEATS)]]
    received = torch.empty(TOKENS, HIDDEN, device=device, dtype=torch.bfloat16)
    for name, group in groups.items():
        torch.cuda.synchronize()
        dist.barrier(host)
        if rank == 1:
            work = dist.irecv(received, 0, group=group)
            beside.append([f"a receive posted, {name}", elapsed_us(products, REPEATS)])
            dist.barrier(host)
            assert work is not None
            work.wait()
        else:
            time.sleep(1.0)
            dist.barrier(host)
            dist.send(received, 1, group=group)
    # What a stage may wait with for its hidden states: a kernel, or a command of the card's front end.
    signal = symmetric_memory.rendezvous(symmetric_memory.empty(64, device=device, dtype=torch.uint8), host)
    side = StreamQueue(torch.cuda.Stream(device, priority=-1))

    def wait_by_kernel() -> None:
        with torch.cuda.stream(side.stream):
            signal.wait_signal(0, 0)

    waits: list[tuple[str, Callable[[], object], Callable[[], object]]] = [
        ("a kernel that waits", wait_by_kernel, partial(signal.put_signal, 1, 0)),
        (
            "a command that waits",
            lambda: messages_to_peer.take(side),
            lambda: messages_to_peer.push(HIDDEN),
        ),
    ]
    for name, wait, release in 2 * waits:
        torch.cuda.synchronize()
        dist.barrier(host)
        if rank == 1:
            wait()
            beside.append([name, elapsed_us(products, REPEATS)])
        dist.barrier(host)
        if rank == 0:
            release()
    beside.append(["nothing", elapsed_us(products, REPEATS)])
    found = [beside]
    dist.broadcast_object_list(found, src=1, group=host)
    torch.cuda.synchronize()
    if rank == 0:
        print_table(["MiB", *(f"{name} us" for name in groups), "peer memory us"], messages, title="A message, one way")
        print_table(["beside", "two products us"], found[0], title=f"Products of {TOKENS} tokens on the receiving card")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
