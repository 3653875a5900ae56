"""Latent attention on one rank: queries, what is kept of a token, and attention over that, expanded or as it is.

Multi-head latent attention (DeepSeek-V2, 2405.04434). Every rank of a tensor-parallel group keeps whole latents, and
makes keys and values of its own heads of them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from profiler.kernels import cpu_attention
from profiler.kernels.attention_kernel import CAUSAL, EXPANDED_NUMBERS
from profiler.kernels.elementwise import HeadNorms, TokenPlaces, rms_norm, rotate
from profiler.kernels.entry import Operand
from profiler.kernels.quantized.kv import KV
from profiler.model.rope import Rotation
from profiler.model.spec import LatentSpec

LATENT_EPS = 1e-6  # of the latents' norms, whatever other norms have


class Latent:
    """The latents of one layer: H heads of a rank, each with its part of what expands them."""

    def __init__(self, spec: LatentSpec, q: Callable[[Operand], torch.Tensor], expand: torch.Tensor) -> None:
        """q: the product that makes queries [T, H D]. expand: [H (plain + value), rank]."""
        self.spec, self.q = spec, q
        self.expand = expand.view(-1, spec.plain + spec.value, spec.rank)
        self.of_keys, self.of_values = self.expand[:, : spec.plain], self.expand[:, spec.plain :]

    def project(self, normed: Operand, down: torch.Tensor, query_norm: torch.Tensor | None) -> torch.Tensor:
        """normed: [T, hidden], down: what the layer's first product made of it, the queries' latent if there is one and
        what is kept -> q|kept [T, H D + kept]."""
        if query_norm is None:
            return torch.cat([self.q(normed), down], dim=1)
        latent, kept = down.tensor_split([-self.spec.kept], dim=1)
        return torch.cat([self.q(rms_norm(latent, query_norm, LATENT_EPS)), kept], dim=1)

    def rotate(
        self, projected: torch.Tensor, places: TokenPlaces, norms: HeadNorms, keys: KV, rotation: Rotation
    ) -> torch.Tensor:
        """Norm the latents, turn the shared key and the queries, write what is kept to keys [1, rows, kept]
        -> q [T, H, D]."""
        spec, (cos, sin) = self.spec, places.rotary[rotation]
        assert norms.key is not None  # every latent has a norm
        queries, latent, key = projected.tensor_split([-spec.kept, -spec.turned], dim=1)
        normed = rms_norm(latent, norms.key, LATENT_EPS)
        places.write(torch.cat([normed, rotate(key[:, None], cos, sin)[:, 0]], dim=1)[:, None], keys)
        q = queries.view(queries.shape[0], -1, spec.plain + spec.turned)
        q[..., spec.plain :] = rotate(q[..., spec.plain :], cos, sin)
        return q

    def attend(self, q: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """See `profiler.kernels.attention_kernel.Latents`: by the way that takes fewer FLOPs."""
        spec, chunk = self.spec, q.shape[1]
        if spec.absorbs(chunk, rows.shape[0] - chunk):
            return self.restore(self.attend_absorbed(self.absorb(q), rows))
        latents, key = rows.split([spec.rank, spec.turned], dim=1)
        at_once = max(1, EXPANDED_NUMBERS // (rows.shape[0] * (spec.plain + spec.turned + spec.value)))
        outputs = []
        for heads, expand in zip(q.split(at_once), self.expand.split(at_once), strict=True):
            made = F.linear(latents, expand.flatten(0, 1)).view(rows.shape[0], heads.shape[0], -1).transpose(0, 1)
            keys = torch.cat([made[..., : spec.plain], key.expand(heads.shape[0], -1, -1)], dim=2)
            outputs.append(cpu_attention.attend_masked(heads, keys, made[..., spec.plain :], CAUSAL))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def absorb(self, q: torch.Tensor) -> torch.Tensor:
        """See `profiler.kernels.attention_kernel.Latents`; scaled, as kernels divide scores by the root of features."""
        spec = self.spec
        latent = torch.bmm(q[..., : spec.plain], self.of_keys)
        return torch.cat([latent, q[..., spec.plain :]], dim=2).mul_((spec.kept / q.shape[2]) ** 0.5)

    def attend_absorbed(self, q: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """See `profiler.kernels.attention_kernel.Latents`: all heads share the rows."""
        return cpu_attention.attend_masked(q, rows[None], rows[None, :, : self.spec.rank], CAUSAL)

    def restore(self, mixed: torch.Tensor) -> torch.Tensor:
        """See `profiler.kernels.attention_kernel.Latents`."""
        return torch.bmm(mixed, self.of_values.transpose(1, 2))
