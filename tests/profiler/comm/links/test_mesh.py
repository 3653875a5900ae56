"""Where ranks stand, and which of them reach each other's memory."""

from __future__ import annotations

import pytest

from profiler.comm.links.mesh import Host, Mesh, Transport, agree


@pytest.mark.parametrize("pp_size", [1, 2, 3])
@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_every_rank_has_one_place(pp_size: int, tp_size: int) -> None:
    mesh = Mesh(pp_size=pp_size, tp_size=tp_size)
    places = [mesh.place(rank) for rank in range(mesh.world_size)]
    assert places == [(stage, tp_rank) for stage in range(pp_size) for tp_rank in range(tp_size)]
    assert [mesh.rank(*place) for place in places] == list(range(mesh.world_size))
    in_groups = sorted(rank for group in mesh.tensor_groups() for rank in group)
    assert in_groups == (list(range(mesh.world_size)) if tp_size > 1 else [])
    assert len(list(mesh.boundaries())) == (pp_size - 1) * tp_size
    assert all(second - first == tp_size for first, second in mesh.boundaries())
    assert list(mesh.returns()) == [(r, mesh.rank(pp_size - 1, r)) for r in range(tp_size) if pp_size > 1]


def hosts(*names: str, without: tuple[int, ...] = ()) -> list[Host]:
    return [Host(name=name, has_peer_memory=rank not in without) for rank, name in enumerate(names)]


def test_ranks_of_one_host_share_memory_and_those_of_two_do_not() -> None:
    known = agree(hosts("0", "0", "1", "1"))
    assert known.groups() == [(0, 1), (2, 3)]
    transports = [known.transport(*pair) for pair in ((0, 1), (1, 2), (2, 3), (3, 0))]
    peer, collective = Transport.PEER_MEMORY, Transport.COLLECTIVE
    assert transports == [peer, collective, peer, collective]


def test_one_rank_without_it_takes_it_from_its_whole_host() -> None:
    known = agree(hosts("0", "0", "0", "1", "1", without=(2,)))
    assert known.groups() == [(3, 4)]
    assert known.transport(0, 1) is Transport.COLLECTIVE
