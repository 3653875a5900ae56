"""Attention in one cuDNN kernel with a bottom-right causal mask, through the optional package nvidia-cudnn-frontend."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch

Sizes = tuple[int, ...]


class _Id(IntEnum):
    """Names of a graph's tensors."""

    Q = 1
    K = 2
    V = 3
    OUT = 4


@dataclass(frozen=True, slots=True)
class _Graph:
    graph: Any
    workspace_bytes: int


def is_installed() -> bool:
    """Whether the package is there; it is named cudnn."""
    return find_spec("cudnn") is not None


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """q: [1, H, c, D], k and v: [1, KV, p + c, D], any strides of contiguous rows -> [1, H, c, D], laid out [c, H, D].

    The first call with new sizes or strides builds a graph, which takes some 50 to 100 ms of the host.
    """
    _, heads, chunk, head_dim = q.shape
    out = torch.empty((1, chunk, heads, head_dim), device=q.device, dtype=q.dtype).transpose(1, 2)
    handle = _handle(q.device)
    built = _build(q.device, q.dtype, q.shape, q.stride(), k.shape, k.stride(), v.stride(), out.stride())
    workspace = torch.empty(max(built.workspace_bytes, 1), device=q.device, dtype=torch.uint8)
    tensors = {int(_Id.Q): q, int(_Id.K): k, int(_Id.V): v, int(_Id.OUT): out}  # the package asks for plain integers
    built.graph.execute(tensors, workspace, handle=handle)
    return out


def _handle(device: torch.device) -> Any:
    import cudnn

    handle = _create_handle(device)
    cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream(device).cuda_stream)
    return handle


@cache
def _create_handle(device: torch.device) -> Any:
    import cudnn

    return cudnn.create_handle()


@cache
def _build(
    device: torch.device,
    dtype: torch.dtype,
    q_size: Sizes,
    q_stride: Sizes,
    kv_size: Sizes,
    k_stride: Sizes,
    v_stride: Sizes,
    out_stride: Sizes,
) -> _Graph:
    import cudnn

    half = cudnn.data_type.BFLOAT16 if dtype == torch.bfloat16 else cudnn.data_type.HALF
    graph = cudnn.pygraph(
        handle=_create_handle(device),
        io_data_type=half,
        intermediate_data_type=cudnn.data_type.FLOAT,
        compute_data_type=cudnn.data_type.FLOAT,
    )

    def tensor(name: _Id, size: Sizes, stride: Sizes) -> Any:
        return graph.tensor(name=name.name, dim=list(size), stride=list(stride), data_type=half, uid=int(name))

    out, _ = graph.sdpa(
        name="sdpa",
        q=tensor(_Id.Q, q_size, q_stride),
        k=tensor(_Id.K, kv_size, k_stride),
        v=tensor(_Id.V, kv_size, v_stride),
        generate_stats=False,
        attn_scale=1.0 / math.sqrt(q_size[-1]),
        diagonal_alignment=cudnn.diagonal_alignment.BOTTOM_RIGHT,
        diagonal_band_right_bound=0,
    )
    out.set_uid(int(_Id.OUT)).set_output(True).set_dim(list(q_size)).set_stride(list(out_stride)).set_data_type(half)
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    graph.check_support()
    graph.build_plans()
    return _Graph(graph, graph.get_workspace_size())
