"""What a calibration set shows of a linear's input: the ends of its channels, and a sample of its rows."""

from __future__ import annotations

import torch

from profiler.kernels.quantized.rounding import LARGEST
from profiler.kernels.quantized.weight import Observer, ends_of
from runtime.quantize.report import ChannelEnds

SAMPLE_ROWS = 512  # of all tokens seen; observers other than the largest value, and output errors, look at these


class InputRanges:
    """Ranges of x [T, K] over all calls."""

    def __init__(self, rows_of_call: int = SAMPLE_ROWS) -> None:
        self.num_tokens, self.rows_of_call = 0, rows_of_call
        self.lowest: torch.Tensor | None = None  # [K]
        self.highest: torch.Tensor | None = None
        self.samples: list[torch.Tensor] = []

    def see(self, x: torch.Tensor) -> None:
        """Take note of x [T, K]; rows are sampled evenly from each call."""
        low, high = x.amin(dim=0).float(), x.amax(dim=0).float()
        self.lowest = low if self.lowest is None else torch.minimum(self.lowest, low)
        self.highest = high if self.highest is None else torch.maximum(self.highest, high)
        self.num_tokens += x.shape[0]
        step = max(1, x.shape[0] // self.rows_of_call)
        self.samples.append(x[::step].float().clone())

    @property
    def sample(self) -> torch.Tensor:
        """Rows seen, [R, K] float32, as many as are kept at most."""
        rows = torch.cat(self.samples)
        return rows[:: max(1, rows.shape[0] // SAMPLE_ROWS)][:SAMPLE_ROWS]

    @property
    def channel_ends(self) -> torch.Tensor:
        """The largest magnitude of each channel, [K]."""
        assert self.lowest is not None and self.highest is not None
        return torch.maximum(-self.lowest, self.highest)

    def summary(self) -> ChannelEnds | None:
        """The ends of the channels in five numbers; None where nothing was seen."""
        if not self.num_tokens:
            return None
        quartiles = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], device=self.channel_ends.device)
        least, lower, median, upper, most = self.channel_ends.quantile(quartiles).tolist()
        return ChannelEnds(least=least, lower=lower, median=median, upper=upper, most=most)

    def scaled(self, factors: torch.Tensor) -> InputRanges:
        """The ranges of x times factors [K], all positive."""
        assert self.lowest is not None and self.highest is not None
        made = InputRanges(self.rows_of_call)
        made.num_tokens = self.num_tokens
        made.lowest, made.highest = self.lowest * factors, self.highest * factors
        made.samples = [self.sample * factors]
        return made

    def static(self, dtype: torch.dtype, observer: Observer, *, asymmetric: bool) -> tuple[torch.Tensor, float]:
        """Scale [1] float32 and offset of one range for all."""
        assert self.lowest is not None and self.highest is not None
        sample = self.sample.flatten()
        end = self.channel_ends.max() if observer is Observer.MINMAX else ends_of(sample, dtype, observer)
        if not asymmetric or dtype != torch.int8:
            return (end.clamp_min(1e-12) / LARGEST[dtype]).reshape(1), 0.0
        low = torch.maximum(self.lowest.min(), -end).clamp_max(0.0)
        high = torch.minimum(self.highest.max(), end).clamp_min(0.0)
        scale = ((high - low) / 255.0).clamp_min(1e-12)
        return scale.reshape(1), float((-128.0 - low / scale).round().clamp(-128.0, 127.0))
