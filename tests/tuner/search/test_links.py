"""Which messages of a layout cross hosts, and what formulas say of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from db.errors import UserError
from profiler.points.point import Op
from profiler.sequence.kind import SPKind
from tests.tuner.search.test_layouts import rows
from tuner.fit.rows import Rows
from tuner.plan.layout import Layout
from tuner.plan.stage_order import StageOrder
from tuner.plan.topology import LinkSpeed, Topology, load_topology
from tuner.search.links import Links, seconds

LINK = LinkSpeed(bandwidth_gb_s=10.0, latency_us=5.0)
FILE = {
    "schema": "isochunk.topology/1",
    "hosts": 2,
    "cards_per_host": 4,
    "inside_host": {"bandwidth_gb_s": 300.0, "latency_us": 4},
    "between_hosts": {"bandwidth_gb_s": 25, "latency_us": 12},
}


def topology(hosts: int = 2, cards_per_host: int = 4) -> Topology:
    fast = LinkSpeed(bandwidth_gb_s=300.0, latency_us=4.0)
    return Topology(hosts=hosts, cards_per_host=cards_per_host, inside_host=fast, between_hosts=LINK)


def test_what_collectives_take_by_hand() -> None:
    """1e6 bytes over 10 GB/s are 100 us."""
    assert seconds(Op.SEND_RECV, 1e6, 2, LINK) == pytest.approx(105e-6)
    assert seconds(Op.ALL_GATHER, 1e6, 4, LINK) == pytest.approx(15e-6 + 75e-6)
    assert seconds(Op.REDUCE_SCATTER, 1e6, 4, LINK) == seconds(Op.ALL_TO_ALL, 1e6, 4, LINK) == pytest.approx(90e-6)
    assert seconds(Op.ALL_REDUCE, 1e6, 4, LINK) == pytest.approx(180e-6)
    assert seconds(Op.ALL_REDUCE, 1e3, 64, LINK) == pytest.approx(12 * 5e-6 + 0.2e-6)  # a tree of six levels
    big = seconds(Op.ALL_GATHER, 1e9, 8, LINK)
    assert seconds(Op.ALL_GATHER, 2e9, 8, LINK) == pytest.approx(2 * big, rel=1e-3)


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        (Layout(tp_size=4, pp_size=2), (1, 1, 2)),
        (Layout(tp_size=8, pp_size=1), (2, 1, 1)),
        (Layout(tp_size=2, pp_size=1, sp_size=4, sp_kind=SPKind.GATHER), (1, 2, 1)),
        (Layout(tp_size=1, pp_size=2, sp_size=4, sp_kind=SPKind.RING), (1, 1, 2)),
        (Layout(tp_size=2, pp_size=2), (1, 1, 1)),
        (Layout(tp_size=1, pp_size=4), (1, 1, 1)),
        (Layout(tp_size=1, pp_size=8), (1, 1, 2)),
    ],
)
def test_groups_and_boundaries_that_leave_a_host(layout: Layout, expected: tuple[int, int, int]) -> None:
    reach = topology().reach(layout)
    assert (reach.tensor, reach.sequence, reach.boundary) == expected


def test_ranks_that_share_rows_leave_a_host_where_it_has_too_few_cards() -> None:
    def leaves(sp_size: int, tp_size: int, given: Topology | None) -> bool:
        layout = Layout(tp_size=tp_size, pp_size=1, sp_size=sp_size, sp_kind=SPKind.GATHER)
        return Links(Rows([]), given).leaves_host(layout)

    assert leaves(8, 1, topology()) and leaves(2, 4, topology())
    assert not leaves(4, 1, topology()) and not leaves(2, 2, topology()) and not leaves(8, 1, None)


def test_a_loop_goes_back_between_hosts() -> None:
    """On hosts of three cards two stages of two ranks: rank 1 to 3 leaves, and the way back does too."""
    loop = Layout(tp_size=1, pp_size=3, virtual_stages=2)
    up_and_down = Layout(tp_size=1, pp_size=3, virtual_stages=2, stage_order=StageOrder.V)
    assert topology(cards_per_host=3).reach(loop).boundary == 1
    assert (
        topology(cards_per_host=2).reach(loop).boundary == topology(cards_per_host=2).reach(up_and_down).boundary == 2
    )


def test_rows_stand_for_what_crosses_hosts_and_no_others() -> None:
    measured = rows("llama-3.2-1b")
    links = Links(measured, topology())
    inside = Layout(tp_size=4, pp_size=1)
    assert links.assumed(inside) == ()
    assert links.rows_for(inside) is measured
    across = Layout(tp_size=4, pp_size=2)
    assert [str(group) for group in links.assumed(across)] == ["hand-offs between hosts"]
    made = links.rows_for(across).select("send_recv", {}, busy_ranks=8, group_size=2)
    for row in made:
        assert row.median_us == pytest.approx(1e6 * seconds(Op.SEND_RECV, row.shape["bytes"], 2, LINK))
    reduced = links.rows_for(across).select("all_reduce", {}, busy_ranks=8, group_size=4)
    assert reduced == measured.select("all_reduce", {}, busy_ranks=8, group_size=4)
    gathered = Layout(tp_size=2, pp_size=1, sp_size=4, sp_kind=SPKind.GATHER)
    assert [str(group) for group in links.assumed(gathered)] == ["groups of 4 between hosts"]
    assert Links(measured, None).assumed(gathered) == ()


def test_a_topology_is_read(tmp_path: Path) -> None:
    path = tmp_path / "topology.json"
    path.write_text(json.dumps(FILE))
    found = load_topology(path)
    assert (found.hosts, found.cards_per_host, found.num_cards) == (2, 4, 8)
    assert found.between_hosts == LinkSpeed(bandwidth_gb_s=25.0, latency_us=12.0)
    found.check_world(8)
    with pytest.raises(UserError, match=r"^world_size: 9; at most 8, the cards of 2 hosts with 4 each"):
        found.check_world(9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": "isochunk.topology/2"}, "schema: isochunk.topology/2; isochunk.topology/1"),
        ({"hosts": 0}, "hosts: 0; at least 1"),
        ({"hosts": 10**6}, "hosts: 1000000; at most 100000 cards in all"),
        ({"cards_per_host": "four"}, "cards_per_host: four; a whole number"),
        ({"inside_host": {"bandwidth_gb_s": 0, "latency_us": 1}}, "inside_host.bandwidth_gb_s: 0"),
        ({"between_hosts": {"bandwidth_gb_s": 1}}, "between_hosts.latency_us: missing"),
        ({"between_hosts": {"bandwidth_gb_s": 1, "latency_us": -1}}, "between_hosts.latency_us: -1"),
        ({"inside_host": None}, "inside_host: missing"),
    ],
)
def test_bad_topologies_are_named_in_one_line(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "topology.json"
    path.write_text(json.dumps(FILE | change))
    with pytest.raises(UserError) as refused:
        load_topology(path)
    assert f"topology.json: {message}" in str(refused.value)
    assert "\n" not in str(refused.value)
