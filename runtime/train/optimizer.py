"""The update: gradients unscaled and clipped, AdamW on a float32 master copy, weights cast from it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from runtime.train.parameters import Parameter
from runtime.train.recipe import LARGEST_SCALE, TrainingRecipe

FIRST_SCALE = 2.0**16
GROWS_AFTER = 1000  # steps in a row that were not skipped


@dataclass(slots=True)
class LossScale:
    """What the loss is multiplied by, so that gradients in float16 do not vanish; a power of two, undone exactly.

    It halves when a gradient is no number, and that step is skipped; it doubles after many steps that were not
    (Micikevicius et al., 2018).
    """

    value: float
    grows: bool
    good_steps: int = 0
    skipped_steps: int = 0

    @classmethod
    def of(cls, recipe: TrainingRecipe) -> LossScale:
        """As the recipe begins."""
        is_dynamic = recipe.loss_scale is None and recipe.formats.activations.name == "float16"
        return cls(recipe.loss_scale or (FIRST_SCALE if is_dynamic else 1.0), is_dynamic)

    def update(self, is_finite: bool) -> None:
        """After a step."""
        self.skipped_steps += not is_finite
        if not self.grows:
            return
        self.good_steps = self.good_steps + 1 if is_finite else 0
        if not is_finite:
            self.value = max(1.0, self.value / 2.0)
        elif self.good_steps % GROWS_AFTER == 0:
            self.value = min(LARGEST_SCALE, self.value * 2.0)


class Optimizer:
    """AdamW (Loshchilov and Hutter, 2019) over a rank's parameters, with torch's own kernel.

    Biases and norms do not decay. Each rank holds the state of its own slices; what several ranks hold alike they
    update alike.
    """

    def __init__(
        self, parameters: Sequence[Parameter], recipe: TrainingRecipe, *, is_first_tp: bool, everyone: dist.ProcessGroup
    ) -> None:
        self.parameters, self.recipe, self.everyone = parameters, recipe, everyone
        self.counts = [parameter.is_cut or is_first_tp for parameter in parameters]
        self.masters = [parameter.master for parameter in parameters if parameter.master is not None]
        decays = [parameter.weight.dim() > 1 for parameter in parameters]
        self.adam = torch.optim.AdamW(
            [
                {
                    "params": [x for x, decay in zip(self.masters, decays, strict=True) if decay is wanted],
                    "weight_decay": recipe.weight_decay if wanted else 0.0,
                }
                for wanted in (True, False)
            ],
            lr=recipe.learning_rate,
            betas=recipe.betas,
            eps=recipe.eps,
            fused=True,
        )

    @torch.no_grad()
    def step(self, rate: float, scale: LossScale) -> float:
        """Update all weights unless a gradient is no number; the global norm of the gradients is returned."""
        squares = torch.zeros((), dtype=torch.float64)
        mine = [parameter.grads for parameter, counts in zip(self.parameters, self.counts, strict=True) if counts]
        if mine:
            norms = torch.stack(torch._foreach_norm([grads for grads in mine if grads is not None]))
            squares = norms.double().square().sum().cpu()
        dist.all_reduce(squares, group=self.everyone)
        norm = math.sqrt(float(squares)) / scale.value if torch.isfinite(squares) else math.inf
        if math.isfinite(norm):
            factor = 1.0 / scale.value
            if self.recipe.clip_norm is not None:
                factor *= min(1.0, self.recipe.clip_norm / (norm + 1e-6))
            self._update(rate, factor)
        scale.update(math.isfinite(norm))
        return norm

    def _update(self, rate: float, factor: float) -> None:
        grads = [parameter.grads for parameter in self.parameters if parameter.grads is not None]
        if factor != 1.0:
            torch._foreach_mul_(grads, factor)
        for master, grad in zip(self.masters, grads, strict=True):
            master.grad = grad
        for group in self.adam.param_groups:
            group["lr"] = rate
        self.adam.step()
        self.cast()

    @torch.no_grad()
    def cast(self) -> None:
        """The weights that are multiplied, from the master copy."""
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if parameter.weight.dtype != master.dtype:
                parameter.weight.copy_(master)

    def state(self) -> dict[str, torch.Tensor]:
        """The master copy and both moments of every parameter, by `NAME/KIND`."""
        found = {}
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            found[f"{parameter.name}/master"] = master
            for kind, tensor in self.adam.state[master].items():
                found[f"{parameter.name}/{kind}"] = tensor
        return found

    @torch.no_grad()
    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from what `state` gave."""
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            master.copy_(state[f"{parameter.name}/master"])
            kinds = ("step", "exp_avg", "exp_avg_sq")
            found = {kind: state.get(f"{parameter.name}/{kind}") for kind in kinds}
            self.adam.state[master] = {
                kind: tensor.to(master.device) for kind, tensor in found.items() if tensor is not None
            }
        self.cast()
