"""The search over layouts against planning every layout: the same plan or not, and CPU seconds of both.

    python -m benchmarks.layout_search PROFILE... [--world-sizes 2,4] [--objectives makespan,mean-ttft]
    python -m benchmarks.layout_search PROFILE... --workload TRACE [--num-requests 120,1000]

Both go from the same rows over the fits to the ranking. Of a trace every policy is replayed for the best layouts, and
the best one's plan stands beside its rivals: by the replays that are known, and by all of them made anew. Ranks beyond
a profile's cards stand on hosts of eight cards, 360 GB/s inside a host and 45 between hosts. Exit code 1 where a plan
differs.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

from db.rows.archive import import_hardware
from db.rows.hardware import Hardware, get_hardware
from db.rows.measurements import load_measurements
from db.store.engine import open_database
from profiler.model import ModelShape, load_model_shape
from service.use_cases.contest import contest
from tuner.fit.layer_fit import fit_layer_costs
from tuner.fit.rows import RankWork, Rows
from tuner.fit.whole.costs import Costs
from tuner.plan.layout import ANY, Layout, enumerate_layouts
from tuner.plan.plan import Request
from tuner.plan.topology import LinkSpeed, Topology
from tuner.rounds.round_plan import RoundPlan
from tuner.search.layouts import Candidate, search_layouts
from tuner.search.links import Links
from tuner.search.rules import Rules
from tuner.search.target import Target
from tuner.workload.objective import Objective
from tuner.workload.prompt_lens import parse_prompt_lens
from tuner.workload.workload import load_workload

PROMPTS = "49152;131072,32768,8192*4;3000*40"
INSIDE, BETWEEN = LinkSpeed(bandwidth_gb_s=360.0, latency_us=4.0), LinkSpeed(bandwidth_gb_s=45.0, latency_us=12.0)
DTYPE, CHUNK_MULTIPLE, CARDS_PER_HOST = "bfloat16", 256, 8


def topology_of(world_size: int) -> Topology:
    """Hosts of eight cards, or a smaller one."""
    per_host = min(world_size, CARDS_PER_HOST)
    return Topology(
        hosts=-(-world_size // per_host), cards_per_host=per_host, inside_host=INSIDE, between_hosts=BETWEEN
    )


def fitter(hardware: Hardware, shape: ModelShape, links: Links, longest_prompt: int) -> Callable[[Layout], Costs]:
    """Costs of a layout, fitted once for all of the same work and messages."""
    known: dict[object, Costs] = {}

    def fit(layout: Layout) -> Costs:
        key = (
            layout.tp_size,
            layout.sp_size,
            layout.sp_kind,
            layout.weights,
            layout.ep_size,
            layout.dispatch,
            layout.pp_size > 1,
            *links.key(layout),
        )
        if key not in known:
            work = RankWork.on(
                hardware,
                shape=shape.spread(**layout.spread),
                dtype=DTYPE,
                tp_size=layout.tp_size,
                sp_size=layout.sp_size,
                sp_kind=layout.sp_kind,
                weights=layout.weights,
                longest_prompt=longest_prompt,
            )
            known[key] = fit_layer_costs(links.rows_for(layout), work, busy_ranks=layout.world_size)
        return known[key]

    return fit


def searched(
    hardware: Hardware,
    rows: Rows,
    shape: ModelShape,
    world_size: int,
    requests: tuple[Request, ...],
    rules: Rules,
    *,
    every: bool = False,
) -> tuple[list[Candidate], float]:
    """The ranking, and the CPU seconds that it took."""
    num_cards = hardware.device_count
    target = Target(
        shape=shape,
        dtype=DTYPE,
        requests=requests,
        device_type=hardware.device_type,
        memory_bytes=hardware.memory_bytes,
    )
    started = time.process_time()
    links = Links(rows, topology_of(world_size) if world_size > num_cards else None, num_cards=num_cards)
    fit = fitter(hardware, shape, links, max(request.prompt_tokens for request in requests))
    found = search_layouts(target, enumerate_layouts(shape, world_size, ANY), rules, fit, every=every)
    return found, time.process_time() - started


def contested(best: Candidate, requests: tuple[Request, ...], rules: Rules) -> tuple[RoundPlan, float]:
    """The best layout's plan for a trace beside its rivals, and the CPU seconds that this took."""
    started = time.process_time()
    cost = best.layout_costs.cost_model(best.layer_partition)
    planned = contest(cost, requests, best.rules(rules), compare=False).planned
    return planned, time.process_time() - started


def is_equal(one: Candidate, other: Candidate) -> bool:
    """Whether layout, partition, rounds and cuts are the same."""
    assert one.rounds is not None and other.rounds is not None
    mine, theirs = ((each.layout, each.layer_partition, each.cuts) for each in (one, other))
    return mine == theirs and one.rounds.rounds == other.rounds.rounds


def main() -> int:
    """Print a row a search."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("profiles", nargs="+", type=Path, metavar="PROFILE")
    parser.add_argument("--model", default="llama-3-8b")
    parser.add_argument("--world-sizes", default="2,4")
    parser.add_argument("--objectives", default="makespan,mean-ttft")
    parser.add_argument("--prompts", default=PROMPTS)
    parser.add_argument("--workload", type=Path, metavar="TRACE")
    parser.add_argument("--num-requests", default="120,1000", help="of the trace")
    parser.add_argument("--rate", type=float, default=1.0, help="how much faster they arrive")
    options = parser.parse_args()
    shape = load_model_shape(options.model)
    batches = {lens: parse_prompt_lens(lens) for lens in options.prompts.split(";")}
    if options.workload:
        counts = map(int, options.num_requests.split(","))
        traces = [load_workload(options.workload, rate=options.rate, limit=count).requests for count in counts]
        batches = {f"a trace of {len(requests)}": requests for requests in traces}
    print(
        f"{'profile':>22} {'ranks':>5} {'objective':>9} {'prompts':>22} {'layouts':>7} {'planned':>7} {'equal':>5} "
        f"{'CPU s':>7} {'anew' if options.workload else 'of all':>7}"
    )
    num_equal, rows_printed, spent_s, all_s = 0, 0, 0.0, 0.0
    for profile in options.profiles:
        with TemporaryDirectory() as folder, open_database(f"sqlite:///{folder}/rows.db") as database:
            hardware = get_hardware(database, import_hardware(database, profile).hardware_id)
            rows = Rows(load_measurements(database, hardware, dtype=DTYPE))
        wanted = product(map(int, options.world_sizes.split(",")), options.objectives.split(","), batches.items())
        for world_size, name, (words, requests) in wanted:
            rules = Rules(chunk_multiple=CHUNK_MULTIPLE, objective=Objective.parse(name))
            ours, own_s = searched(hardware, rows, shape, world_size, requests, rules)
            if options.workload:
                (told, told_s), (anew, anew_s) = (
                    contested(ours[0], requests, each) for each in (rules, replace(rules, known={}))
                )
                same, every_s, own_s = told.rounds == anew.rounds, own_s + anew_s, own_s + told_s
            else:
                every, every_s = searched(hardware, rows, shape, world_size, requests, rules, every=True)
                same = is_equal(ours[0], every[0])
            num_equal, rows_printed = num_equal + same, rows_printed + 1
            spent_s, all_s = spent_s + own_s, all_s + every_s
            planned = sum(candidate.rounds is not None for candidate in ours)
            print(
                f"{profile.name.partition('.')[0]:>22} {world_size:5d} {name:>9} {words:>22} {len(ours):7d} "
                f"{planned:7d} {'yes' if same else 'NO':>5} {own_s:7.2f} {every_s:7.2f}",
                flush=True,
            )
    seconds = f"{spent_s / all_s:.0%} of the CPU time ({spent_s:.1f} of {all_s:.1f} s)"
    print(f"{num_equal} of {rows_printed} equal, in {seconds}")
    return 0 if num_equal == rows_printed else 1


if __name__ == "__main__":
    sys.exit(main())
