"""Settings of the online planner, and their text form: `joint:aging=0.1,foresight=2`."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Self

from db.errors import UserError
from tuner.workload.objective import Objective

MOST = 1e6
UNSET_AT_0 = ("patience", "pace", "least_work", "makespan")
"""Settings whose 0 stands for none."""
UNSET_AT_1 = ("passing",)
"""Settings whose 1 is usual."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OnlineSettings:
    """Settings of `OnlinePlanner`; what it does as it comes is the default."""

    aging: float = 0.01
    """Seconds of remaining work that a second of waiting makes up for in the running order: long prompts do not starve.
    From about 1 on, requests run as they come."""
    patience: float = 0.0
    """Seconds that a request may take to its first token: least work first as far as that allows (`online.patience`).
    0: no limit, and the running order is that of `aging`."""
    foresight: float = 0.5
    """How much requests to come count beside those that wait: 0 cuts for latency alone, 1000 for throughput."""
    pace: float = 0.0
    """Seconds that rounds take. 0: the planner chooses them for those that wait and those to come."""
    least_work: float = 0.0
    """1: rounds as for the mean TTFT where deadlines are sought: by deadline, all are late under overload."""
    makespan: float = 0.0
    """1: rounds as for the makespan of what waits where a TTFT is sought: longer behind a queue, so that its last
    request, and with it the 99th percentile, comes sooner."""
    passing: float = 1.0
    """How much it counts that requests to come pass the pipeline as slowly as the longest round: with less, rounds grow
    more behind a queue, which lowers the last percent and not the mean."""

    def __post_init__(self) -> None:
        for setting in fields(self):
            value = getattr(self, setting.name)
            if not 0.0 <= value <= MOST:
                raise UserError(setting.name, value, f"a number from 0 to {MOST:g}")

    def objective_of(self, objective: Objective) -> Objective:
        """What the planner is run for where this is sought."""
        if objective.needs_deadlines:
            return Objective.MEAN_TTFT if self.least_work else objective
        return Objective.MAKESPAN if self.makespan else objective

    @classmethod
    def parse(cls, text: str) -> Self:
        """Settings from `name=value,...`; what is left out keeps its default. Raises UserError."""
        settings, names = cls(), [setting.name for setting in fields(cls)]
        for part in filter(None, text.split(",")):
            name, _, value = part.partition("=")
            try:
                number = float(value)
            except ValueError:
                number = math.nan
            if name not in names or math.isnan(number):
                raise UserError("policy", f"joint:{text}", f"joint:NAME=VALUE,... with names of {', '.join(names)}")
            settings = replace(settings, **{name: number})
        return settings

    def __str__(self) -> str:
        """The text that `parse` reads."""
        values = {setting.name: getattr(self, setting.name) for setting in fields(self)}
        unset = {name for name in UNSET_AT_0 if not values[name]} | {name for name in UNSET_AT_1 if values[name] == 1.0}
        return ",".join(f"{name}={value:.6g}" for name, value in values.items() if name not in unset)


AS_IT_COMES = OnlineSettings()
