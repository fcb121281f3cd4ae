"""Watches the logged figures of a run and says in a sentence when they look like a sickness that
the method knows (methods/vitals.py). It sees numbers on the host and costs the device nothing.

All of it is a function of the rows of ``metrics.jsonl``. So a run that was stopped and continued
says nothing twice, and tools/health.py finds the alarms of any run afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from webssl_jax.methods.vitals import Alarm, Limit, Vitals

PATIENCE = 5  # logged rows in a row that begin an alarm, and that end it
WELL = 20  # logged rows in a row without a limit near: the run has left its start behind


class Episode(NamedTuple):
    """An alarm from the step ``start`` to the step ``end``, None while it lasts. words: the
    sentence that was said at the start."""

    alarm: Alarm
    start: int
    words: str
    end: int | None = None


class Watch:
    """Looks at one row after the other.

    An alarm begins when its limits were crossed in PATIENCE rows in a row. It ends when in as many
    they were not, with limits twice as far from the ends of the scale. It is said once.

    A healthy run begins where a sick one ends: a fresh network tells no image from another. So an
    alarm is silent until the run was once well, WELL rows long and by the same margin, or until the
    share ``waits`` of the learning rate's warm-up is over, by when it should have been.

    Args:
      vitals: as the method declares them.
      warmup_steps: of the learning rate.
    """

    def __init__(self, vitals: Vitals, warmup_steps: int):
        self.vitals = vitals
        self._signs = {sign.metric: sign for sign in vitals.signs}
        self._states = [_State(alarm) for alarm in vitals.alarms]
        self._warmup = warmup_steps

    @property
    def episodes(self) -> list[Episode]:
        """All so far, by their start."""
        found = [episode for state in self._states for episode in state.episodes]
        return sorted(found, key=lambda episode: episode.start)

    @property
    def on(self) -> list[Episode]:
        """The episodes that last."""
        return [episode for episode in self.episodes if episode.end is None]

    def look(self, row: Mapping[str, float]) -> list[Episode]:
        """The episodes that begin with ``row``. A row without the figures of an alarm, or with some
        that are not finite, says nothing about it."""
        return [state.episodes[-1] for state in self._states if self._begins(state, row)]

    def look_at_all(self, rows: Iterable[Mapping[str, float]]) -> None:
        """Looks at the rows of a past run."""
        for row in rows:
            self.look(row)

    def _begins(self, state: _State, row: Mapping[str, float]) -> bool:
        limits, step = state.alarm.limits, int(row["step"])
        if not all(math.isfinite(row.get(limit.metric, math.nan)) for limit in limits):
            return False
        state.sick = state.sick + 1 if self._crossed(limits, row, 1.0) else 0
        state.well = 0 if self._crossed(limits, row, 2.0) else state.well + 1
        state.awake |= step > state.alarm.waits * self._warmup or state.well >= WELL
        if state.on and state.well >= PATIENCE:
            state.episodes[-1] = state.episodes[-1]._replace(end=step)
        if state.on or not state.awake or state.sick < PATIENCE:
            return False
        state.episodes.append(Episode(state.alarm, step, self._words(state.alarm, row)))
        return True

    def _crossed(self, limits: Sequence[Limit], row: Mapping[str, float], ease: float) -> bool:
        """Whether all are; ``ease``: how many times as far from the end of the scale they lie."""
        shares = [self._signs[limit.metric].share(row[limit.metric]) for limit in limits]
        return all(
            share < ease * limit.below or 1 - share < ease * (1 - limit.above)
            for limit, share in zip(limits, shares)
        )

    def _words(self, alarm: Alarm, row: Mapping[str, float]) -> str:
        seen = []
        for limit in alarm.limits:
            sign, value = self._signs[limit.metric], row[limit.metric]
            low = sign.share(value) < limit.below
            bound = sign.value(limit.below if low else limit.above)
            seen.append(
                f"{limit.metric.rpartition('/')[2]} {value:.4g} "
                f"(alarm {'under' if low else 'over'} {bound:.4g}, possible {sign.most:.4g})"
            )
        return (
            f"step {int(row['step']):,}: ALARM, {alarm.name}: {alarm.says}. "
            f"{'; '.join(seen)}. Look at {alarm.knobs}; see docs/health.md"
        )


class _State:
    """sick, well: rows in a row until now. awake: whether the alarm may be raised."""

    def __init__(self, alarm: Alarm):
        self.alarm = alarm
        self.sick = self.well = 0
        self.awake = False
        self.episodes: list[Episode] = []

    @property
    def on(self) -> bool:
        return bool(self.episodes) and self.episodes[-1].end is None
