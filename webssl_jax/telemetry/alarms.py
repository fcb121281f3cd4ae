"""Alarms: watches the logged figures of a run for the failures that its method knows
(methods/vitals.py), and describes each in a sentence. It reads numbers on the host and costs the
device nothing.

Everything is a function of the rows of ``metrics.jsonl``. So a run that was stopped and continued
raises no alarm again, and tools/health.py finds the alarms of any run afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from webssl_jax.methods.vitals import Alarm, Limit, Vitals

PATIENCE = 5  # consecutive rows that begin an alarm, and that end it
HEALTHY_ROWS = 20  # consecutive rows far from all limits: the start of training is over


class Episode(NamedTuple):
    """An alarm from the step ``start`` to the step ``end``, None while it lasts. message: as it was
    logged at the start."""

    alarm: Alarm
    start: int
    message: str
    end: int | None = None


class AlarmMonitor:
    """Is given one row after the other, and knows which alarms are active.

    An alarm begins after PATIENCE consecutive rows that cross its limits. It ends after as many
    that do not, with limits twice as far from the ends of the scale. It is raised once.

    A healthy run begins where a failed one ends: a fresh network does not tell images apart. So an
    alarm is not raised until HEALTHY_ROWS consecutive rows were healthy, by the same margin, or
    until the share ``waits`` of the learning rate's warm-up is over, when they should have been.

    Args:
      vitals: what the method declares.
      warmup_steps: of the learning rate.
    """

    def __init__(self, vitals: Vitals, warmup_steps: int):
        self.vitals = vitals
        self._signs = {sign.metric: sign for sign in vitals.signs}
        self._states = [_State(alarm) for alarm in vitals.alarms]
        self._warmup = warmup_steps

    @property
    def episodes(self) -> list[Episode]:
        """All so far, sorted by their start."""
        found = [episode for state in self._states for episode in state.episodes]
        return sorted(found, key=lambda episode: episode.start)

    @property
    def active(self) -> list[Episode]:
        """The episodes that have not ended."""
        return [episode for episode in self.episodes if episode.end is None]

    def update(self, row: Mapping[str, float]) -> list[Episode]:
        """Takes the next row and returns the episodes that begin with it. A row that lacks figures
        of an alarm, or has some that are not finite, does not count for that alarm."""
        return [state.episodes[-1] for state in self._states if self._begins(state, row)]

    def update_all(self, rows: Iterable[Mapping[str, float]]) -> None:
        """Takes all rows of a past run."""
        for row in rows:
            self.update(row)

    def _begins(self, state: _State, row: Mapping[str, float]) -> bool:
        limits, step = state.alarm.limits, int(row["step"])
        if not all(math.isfinite(row.get(limit.metric, math.nan)) for limit in limits):
            return False
        state.crossed = state.crossed + 1 if self._all_crossed(limits, row, 1.0) else 0
        state.healthy = 0 if self._all_crossed(limits, row, 2.0) else state.healthy + 1
        state.armed |= step > state.alarm.waits * self._warmup or state.healthy >= HEALTHY_ROWS
        if state.active and state.healthy >= PATIENCE:
            state.episodes[-1] = state.episodes[-1]._replace(end=step)
        if state.active or not state.armed or state.crossed < PATIENCE:
            return False
        state.episodes.append(Episode(state.alarm, step, self._message(state.alarm, row)))
        return True

    def _all_crossed(
        self, limits: Sequence[Limit], row: Mapping[str, float], margin: float
    ) -> bool:
        """Whether ``row`` crosses all ``limits``. margin: how many times as far from the ends of
        the scale they are put."""
        shares = [self._signs[limit.metric].share(row[limit.metric]) for limit in limits]
        return all(
            share < margin * limit.below or 1 - share < margin * (1 - limit.above)
            for limit, share in zip(limits, shares)
        )

    def _message(self, alarm: Alarm, row: Mapping[str, float]) -> str:
        figures = []
        for limit in alarm.limits:
            sign, value = self._signs[limit.metric], row[limit.metric]
            low = sign.share(value) < limit.below
            bound = sign.value(limit.below if low else limit.above)
            figures.append(
                f"{limit.metric.rpartition('/')[2]} {value:.4g} "
                f"(alarm {'under' if low else 'over'} {bound:.4g}, possible {sign.most:.4g})"
            )
        return (
            f"step {int(row['step']):,}: ALARM, {alarm.name}: {alarm.says}. "
            f"{'; '.join(figures)}. Look at {alarm.knobs}; see docs/health.md"
        )


class _State:
    """Of one alarm. crossed, healthy: consecutive rows until now. armed: whether the alarm may be
    raised."""

    def __init__(self, alarm: Alarm):
        self.alarm = alarm
        self.crossed = self.healthy = 0
        self.armed = False
        self.episodes: list[Episode] = []

    @property
    def active(self) -> bool:
        return bool(self.episodes) and self.episodes[-1].end is None
