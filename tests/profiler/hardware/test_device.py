"""Provenance of the device at hand, and published peaks."""

import pytest
import torch

from db.errors import UserError
from profiler.hardware.datasheet import published_peak_flops
from profiler.hardware.device import (
    cache_bytes,
    check_device_type,
    check_world_size,
    describe_hardware,
    free_bytes,
    nccl_link,
    num_cores,
)


def test_a_cpu_is_described_alike_twice_and_apart_by_its_threads() -> None:
    one, two = (describe_hardware("cpu", num_threads=threads) for threads in (1, 2))
    assert one.backend == "gloo" and one.torch_version == torch.__version__
    assert one.device.endswith(f"({num_cores()} cores)") and len(one.device) > 10
    assert one.memory_bytes > 2**28 and free_bytes(torch.device("cpu")) <= one.memory_bytes
    assert one.fingerprint == describe_hardware("cpu", num_threads=1).fingerprint != two.fingerprint
    assert cache_bytes(torch.device("cpu")) >= 2**18


def test_nccl_transport_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
    assert nccl_link() == "shm"
    monkeypatch.setenv("NCCL_SHM_DISABLE", "1")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "lo")
    assert nccl_link() == "socket/lo"


def test_more_ranks_than_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="world_size: 3; at most one rank for each of the 2 CUDA devices"):
        check_world_size(3, "cuda")
    check_world_size(8, "cpu")


def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="device: cuda; this torch sees no CUDA device"):
        check_device_type("cuda")
    with pytest.raises(UserError, match="device: tpu; must be cpu or cuda"):
        check_device_type("tpu")


@pytest.mark.parametrize(
    ("device", "dtype", "peak"),
    [
        ("NVIDIA H200", "bfloat16", 989.5e12),
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.5e12),
        ("NVIDIA H100 PCIe", "float16", 756e12),
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312e12),
        ("NVIDIA A100-SXM4-80GB", "float32", 19.5e12),
        ("NVIDIA L4", "bfloat16", 121e12),
        ("AMD EPYC (2 cores)", "float32", None),
        ("NVIDIA H200", "int8", 1979e12),
    ],
)
def test_published_peaks(device: str, dtype: str, peak: float | None) -> None:
    assert published_peak_flops(device, dtype) == peak


@pytest.mark.parametrize(
    ("reach", "disabled", "expected"), [(True, "0", "p2p"), (True, "1", "shm"), (False, "0", "shm")]
)
def test_the_link_is_what_the_cards_can_do(
    reach: bool, disabled: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NCCL_P2P_DISABLE", disabled)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.can_device_access_peer", lambda _one, _other: reach)
    monkeypatch.setattr("profiler.hardware.device._nvlink_active", lambda: False)
    assert nccl_link() == expected


def test_a_cpu_is_not_asked_for_thousands_of_ranks() -> None:
    check_world_size(2, "cpu")
    for world_size in (0, 100_000):
        with pytest.raises(UserError, match=f"^world_size: {world_size}; "):
            check_world_size(world_size, "cpu")
