"""Where ranks stand, and which of them reach each other's memory."""

from __future__ import annotations

import pytest

from profiler.comm.links.mesh import Host, Mesh, Transport, agree


@pytest.mark.parametrize("pp_size", [1, 2, 3])
@pytest.mark.parametrize("sp_size", [1, 2, 3])
@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_every_rank_has_one_place(pp_size: int, sp_size: int, tp_size: int) -> None:
    mesh = Mesh(pp_size=pp_size, sp_size=sp_size, tp_size=tp_size)
    places = [mesh.place(rank) for rank in range(mesh.world_size)]
    assert places == [(k, s, t) for k in range(pp_size) for s in range(sp_size) for t in range(tp_size)]
    assert [mesh.rank(*place) for place in places] == list(range(mesh.world_size))
    for size, groups in ((tp_size, list(mesh.tensor_groups())), (sp_size, list(mesh.sequence_groups()))):
        assert sorted(rank for group in groups for rank in group) == list(range(mesh.world_size if size > 1 else 0))
        assert {len(group) for group in groups} <= {size}
    assert all(len({mesh.place(rank)[2] for rank in group}) == 1 for group in mesh.sequence_groups())
    for first, second in mesh.boundaries():
        (stage, *member), (after, *other) = mesh.place(first), mesh.place(second)
        assert (after, other) == (stage + 1, member)
    assert len(list(mesh.boundaries())) == (pp_size - 1) * sp_size * tp_size
    returns = [(r, r + (pp_size - 1) * sp_size * tp_size) for r in range(sp_size * tp_size) if pp_size > 1]
    assert list(mesh.returns()) == returns


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
