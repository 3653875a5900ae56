"""The local device: its description as stored with every row, its memory and its caches.

torch is imported inside the functions that need it, so that planning for a stored hardware does not import it.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from db.errors import UserError
from db.rows.hardware import Hardware

if TYPE_CHECKING:
    import torch

_DEFAULT_CACHE_BYTES = 32 * 2**20
CARD_FILES = ("/dev/nvidiactl", "/dev/nvmap", "/dev/kfd", "/dev/dxg")
"""On Linux one of these is there where torch finds cards: NVIDIA's, their embedded ones, AMD's, those of Windows."""


def describe_hardware(device_type: str, *, num_threads: int) -> Hardware:
    """The hardware that ranks of `num_threads` threads on this machine's devices run on."""
    import torch

    check_device_type(device_type)
    if device_type == "cuda":
        properties = torch.cuda.get_device_properties(0)
        return Hardware(
            device=properties.name,
            device_count=torch.cuda.device_count(),
            memory_bytes=properties.total_memory,
            driver=_nvidia_driver(),
            torch_version=torch.__version__,
            backend="nccl",
            num_threads=num_threads,
            link=nccl_link(),
        )
    return Hardware(
        device=f"{_cpu_name()} ({num_cores()} cores)",
        device_count=1,
        memory_bytes=host_memory_bytes(),
        driver=f"{platform.system()} {platform.release()}",
        torch_version=torch.__version__,
        backend="gloo",
        num_threads=num_threads,
        link=f"gloo/{os.environ.get('GLOO_SOCKET_IFNAME', 'lo')}",
    )


MOST_RANKS_PER_CORE = 8  # more ranks than cores only show that a layout works


def check_device_type(device_type: str) -> None:
    """Raise `UserError` unless torch sees such a device."""
    import torch

    if device_type not in ("cpu", "cuda"):
        raise UserError("device", device_type, "must be cpu or cuda")
    if device_type == "cuda" and not torch.cuda.is_available():
        raise UserError("device", device_type, "this torch sees no CUDA device; use --device cpu")


def check_world_size(world_size: int, device_type: str) -> None:
    """Raise `UserError` for more ranks than this machine has CUDA devices."""
    import torch

    if world_size < 1:
        raise UserError("world_size", world_size, "must be 1 or more")
    most = MOST_RANKS_PER_CORE * num_cores()
    if device_type == "cpu" and world_size > most:
        raise UserError("world_size", world_size, f"at most {most}, {MOST_RANKS_PER_CORE} for each core here")
    if device_type == "cuda" and world_size > torch.cuda.device_count():
        allowed = f"at most one rank for each of the {torch.cuda.device_count()} CUDA devices here"
        raise UserError("world_size", world_size, allowed)


def default_device_type() -> str:
    """CUDA where there is a card, else the CPU."""
    if sys.platform == "linux" and not any(map(os.path.exists, CARD_FILES)):
        return "cpu"  # torch would say so, too, and takes seconds to import
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def default_world_size(device_type: str) -> int:
    """A rank for each card; on a CPU two, where there are two cores."""
    import torch

    return torch.cuda.device_count() if device_type == "cuda" else min(2, num_cores())


def default_num_threads(device_type: str, world_size: int) -> int:
    """The cores shared out among a CPU's ranks; one thread where a card does the work."""
    return max(1, num_cores() // world_size) if device_type == "cpu" else 1


def cache_bytes(device: torch.device) -> int:
    """Size of the last cache before memory: L2 on CUDA, the largest that Linux lists on a CPU."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [_size(path.read_text()) for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max(sizes, default=_DEFAULT_CACHE_BYTES)


def free_bytes(device: torch.device) -> int:
    """Memory that can be allocated now, all ranks of the device together."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    fields = _memory_fields()
    return min(fields.get("MemAvailable", host_memory_bytes()), host_memory_bytes())


def host_memory_bytes() -> int:
    """Memory of the machine, or of the control group that this process is confined to."""
    total = _memory_fields().get("MemTotal") or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    return min(total, int(text)) if text.isdigit() else total


def num_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cards_reach_each_other() -> bool:
    """Whether each of this machine's cards can read and write the memory of all others."""
    import torch

    cards = range(torch.cuda.device_count())
    return all(torch.cuda.can_device_access_peer(one, other) for one in cards for other in cards if one != other)


def nccl_link() -> str:
    """The transport NCCL takes between this machine's cards, as the environment steers it."""
    import torch

    if torch.cuda.device_count() < 2:
        return "none"
    if os.environ.get("NCCL_P2P_DISABLE", "0") == "0" and cards_reach_each_other():
        return "nvlink" if _nvlink_active() else "p2p"
    if os.environ.get("NCCL_SHM_DISABLE", "0") == "0":
        return "shm"
    return f"socket/{os.environ.get('NCCL_SOCKET_IFNAME', 'default')}"


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else ():
        name, _, value = line.partition(":")
        if name.strip() in ("model name", "Model"):
            return value.strip()
    return platform.processor() or platform.machine()


def _memory_fields() -> dict[str, int]:
    path = Path("/proc/meminfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return {name: int(value.split()[0]) * 1024 for name, _, value in (line.partition(":") for line in lines)}


def _size(text: str) -> int:
    number, unit = text.strip()[:-1], text.strip()[-1:]
    factors = {"K": 2**10, "M": 2**20, "G": 2**30}
    return int(number) * factors[unit] if unit in factors else int(text)


def _nvidia_driver() -> str:
    path = Path("/proc/driver/nvidia/version")
    words = path.read_text().split() if path.exists() else []
    versions = [word for word in words if word[:1].isdigit() and "." in word]
    return versions[0] if versions else _nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader") or "unknown"


def _nvlink_active() -> bool:
    return "GB/s" in _nvidia_smi("nvlink", "--status")


def _nvidia_smi(*arguments: str) -> str:
    try:
        done = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip().partition("\n")[0] if arguments[0].startswith("--") else done.stdout
