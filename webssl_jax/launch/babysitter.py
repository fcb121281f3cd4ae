"""Keeps a training going on slices that are taken away, until it is done or its budget is spent.

It looks, compares with what should be, does one thing, sleeps, and looks again. What it knows comes
from gcloud and from the machines, so it can be killed and started again at any time. The exit code
of the training (webssl_jax/cli.py) decides: 0 done; 75 start again; 2 bad input, so stop and tell;
anything else is a failure, tried again a bounded number of times. Starts that all end soon come
after longer and longer pauses: a storage that fails may come back.
"""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Callable

from webssl_jax import cli
from webssl_jax.config import UserError
from webssl_jax.launch import gcloud as cloud
from webssl_jax.launch.cost import Cost, Meter
from webssl_jax.launch.gcloud import Gcloud, GcloudError, Request, Resource
from webssl_jax.launch.job import Job, Report

DONE, GAVE_UP, BAD_INPUT, BUDGET_SPENT = 0, 1, 2, 3
_STEADY_SECONDS = 3600  # a failure after so long is counted as the first
_PATIENCE_SECONDS = 1800  # with machines that do not answer
_LONGEST_PAUSE = 600
_MOST_RESTARTS = 12  # in a row, each asked for by the training within _STEADY_SECONDS


class Clock:
    """The real one; tests have their own."""

    now = staticmethod(time.time)
    sleep = staticmethod(time.sleep)


@dataclasses.dataclass(frozen=True)
class Ending:
    """Why it ended. code: an exit code."""

    code: int
    words: str


class Babysitter:
    """One training on one request.

    Args:
      max_hours: that machines may exist in all; the training is stopped in time to save. None only
        with ``until_running``.
      meter: what was spent of them, under earlier babysitters too.
      poll_seconds: between looks.
      grace_seconds: that machines have to end once one of them has ended, or all were asked to.
      retries: failures in a row before giving up.
      keep: leave the slices when all is over.
      until_running: return once the training runs, and delete nothing.
    """

    def __init__(
        self,
        gcloud: Gcloud,
        request: Request,
        job: Job,
        cost: Cost,
        *,
        max_hours: float | None,
        meter: Meter | None = None,
        clock: Clock | None = None,
        say: Callable[[str], None] = print,
        poll_seconds: float = 60,
        grace_seconds: float = 600,
        retries: int = 3,
        keep: bool = False,
        until_running: bool = False,
    ):
        clock = clock or Clock()
        meter = meter or Meter(clock.now())
        spent_hours = meter.hours(clock.now())
        reserve = (grace_seconds + 2 * poll_seconds) / 3600
        if max_hours is not None and max_hours <= spent_hours + reserve:
            raise UserError(
                f"a budget of {max_hours:.4g} hours is gone before the training can save and stop; "
                f"give more than {spent_hours + reserve:.4g}"
            )
        self._gcloud, self._request, self._job, self._cost = gcloud, request, job, cost
        self._last_hour = None if max_hours is None else max_hours - reserve
        self._max_hours = max_hours
        self._clock, self._say = clock, say
        self._poll, self._grace, self._retries = poll_seconds, grace_seconds, retries
        self._keep, self._until_running = keep, until_running

        self._meter = meter
        self._prepared = ""  # which resource has the source tree: its time of creation
        self._hosts = 0
        self._token, self._started = "", 0.0
        self._watched = False  # whether this attempt was started, or seen running, from here
        self._since: dict[str, float] = {}  # when a condition was first seen
        self._failures = 0
        self._early_ends, self._not_before = 0, 0.0  # ends in a row soon after the start
        self._told = ""
        self.counts: collections.Counter[str] = (
            collections.Counter()
        )  # what happened, for the last line

    # ------------------------------------------------------------------------------- the outside
    def run(self) -> int:
        """Until the end. Returns an exit code: 0 done, 1 gave up, 2 bad input, 3 budget spent."""
        self._say(self._cost.line(self._max_hours))
        try:
            ending = self._until_the_end()
            self._say(ending.words)
            if self._keep or self._until_running:
                self._say(self._still_there())
                return ending.code
            if not self._delete_for_good():
                self._say(self._still_there())
                return max(ending.code, GAVE_UP)
            self._say(self._summary())
            return ending.code
        except KeyboardInterrupt:
            self._say("interrupted; " + self._still_there())
            return cli.EXIT_INTERRUPTED
        except BaseException:
            self._say(self._still_there())
            raise

    def _until_the_end(self) -> Ending:
        troubles, resource = 0, None
        while True:
            pause = self._poll
            try:
                resource = self._look()
                spent = self._last_hour is not None and self._hours() >= self._last_hour
                if spent:
                    return self._stop_in_time(resource)
                if ending := self._step(resource):
                    return ending
                troubles = 0
            except GcloudError as error:
                # Whatever it is, the training may be fine: nothing is deleted for it.
                troubles += 1
                pause = min(self._poll * 2 ** min(troubles, 10), max(_LONGEST_PAUSE, self._poll))
                self._tell(f"gcloud: {error}; trying again")
                if self._last_hour is not None:
                    left = (self._last_hour - self._hours()) * 3600
                    if left <= 0:
                        return self._stop_in_time(resource)  # as it was last seen
                    pause = min(pause, max(left, self._poll))  # one poll is in the reserve
            self._clock.sleep(pause)

    # --------------------------------------------------------------------------------- one look
    def _step(self, resource: Resource | None) -> Ending | None:
        if resource is None:
            return self._create()
        self._request.check(resource)
        if resource.state in cloud.GONE:
            self._tell(f"{resource.name} is {resource.state}: deleting it, to ask for another")
            self._gcloud.delete(resource.name)
            self.counts["slices lost"] += 1
            return None
        if resource.state != cloud.ACTIVE:
            self._tell(f"{resource.name} is {resource.state}")
            return None
        if self._prepared != resource.created:
            return self._prepare(resource)
        return self._attend(self._job.status())

    def _create(self) -> Ending | None:
        self._say(self._cost.line(self._max_hours))
        self._prepared = ""
        try:
            self._gcloud.create(self._request)
        except GcloudError as error:
            if error.stock_out:
                self._tell(f"no chips now: {error}")
                return None
            if error.transient:
                raise  # tried again more and more slowly, as every other command
            return self._failure(f"it cannot be created: {error}", steady=False)
        self.counts["slices asked for"] += 1
        return None

    def _prepare(self, resource: Resource) -> Ending | None:
        try:
            self._hosts = self._gcloud.hosts(resource)
            self._job.install(self._hosts)
        except GcloudError as error:
            return self._unreachable(f"installing: {error}")
        self._since.clear()
        self._early_ends, self._not_before = 0, 0.0
        self._prepared, self._token, self._watched = resource.created, "", False
        self._say(f"{resource.name} is ready: {self._hosts} machine(s)")
        return self._attend(self._job.status())

    def _attend(self, reports: list[Report]) -> Ending | None:
        """Compares how the training is with how it should be."""
        if len(reports) < self._hosts:
            return self._unreachable(f"{len(reports)} of {self._hosts} machines answer")
        self._since.pop("silent", None)
        for report in reports:
            if report.state == "running" and report.digest != self._job.digest:
                raise UserError(
                    f"{report.host} of {self._request.name} runs another command; stop that first "
                    "(tools/tpu.py stop), or take another name"
                )
        ours = [r for r in reports if r.state != "absent" and r.digest == self._job.digest]
        running = [r for r in ours if r.state == "running"]
        self._watched |= bool(running)
        ended = [r for r in ours if r.state != "running"]
        if running and ended:
            return self._uneven(ended)
        self._since.pop("uneven", None)
        if len(running) == len(reports):
            if self._clock.now() - self._started >= _STEADY_SECONDS:
                self._failures = 0
            if self._until_running:
                return Ending(DONE, f"the training runs on {len(running)} machine(s)")
            self._tell(f"training on {len(running)} machine(s)")
            return None
        if len(ended) == len(reports) and self._watched:
            return self._judge(ended)
        # It was never started, or a start got lost on its way to some of them, or it ended before
        # this program was started: whoever starts it again wants another try.
        self._start()
        return None

    def _start(self) -> None:
        if self._clock.now() < self._not_before:
            return
        if not self._token:
            self._started = self._clock.now()
            self.counts["starts"] += 1
            self._token = f"{self.counts['starts']}-{self._started:.0f}"
            self._tell(f"starting the training, attempt {self.counts['starts']}")
        self._job.start(self._token)
        self._watched = True

    def _start_again(self, steady: bool) -> None:
        """After an end: at once, or after a pause where starts have ended soon before."""
        self._early_ends = 0 if steady else self._early_ends + 1
        if self._early_ends > 1:
            pause = min(self._poll * 2 ** (self._early_ends - 2), _LONGEST_PAUSE)
            self._not_before = self._clock.now() + pause
            self._tell(f"starting it again in {pause:.0f} s")
        self._token, self._watched = "", False
        self._start()

    def _uneven(self, ended: list[Report]) -> Ending | None:
        """Some have ended and others have not: they are given time, then they are ended."""
        first = self._since.setdefault("uneven", self._clock.now())
        names = ", ".join(f"{r.host} ({self._how(r)})" for r in ended[:3])
        self._tell(f"{names} ended; waiting for the others")
        if self._clock.now() - first >= self._grace:
            self._say(f"the others did not end in {self._grace:.0f} s: ending them")
            self._job.stop("KILL")
        return None

    def _judge(self, ended: list[Report]) -> Ending | None:
        """All have ended: the exit codes decide."""
        steady = self._clock.now() - self._started >= _STEADY_SECONDS
        known = (DONE, cli.EXIT_BAD_INPUT, cli.EXIT_RESTART)
        worst = [r for r in ended if r.state == "lost" or r.code not in known]
        if not worst:
            if all(r.code == DONE for r in ended):
                return Ending(DONE, "the training is done")
            worst = [r for r in ended if r.code == cli.EXIT_BAD_INPUT]
            if worst:
                self._show_logs(worst)
                return Ending(BAD_INPUT, "the training refuses its input: see its lines above")
            self.counts["restarts asked for by the training"] += 1
            self._start_again(steady)
            if self._early_ends > _MOST_RESTARTS:
                self._show_logs(ended)
                words = f"the training asked for {self._early_ends} restarts in a row, each within "
                words += f"{_STEADY_SECONDS / 3600:.0f} hour of its start; gave up"
                return Ending(GAVE_UP, words)
            return None
        self._show_logs(worst)
        self._token = ""
        how = ", ".join(f"{r.host} {self._how(r)}" for r in worst[:3])
        if ending := self._failure(f"the training failed: {how}", steady):
            return ending
        # A machine that was started anew has lost its mounts: the next look installs first.
        if any(r.state == "lost" for r in worst):
            self._prepared = ""
        else:
            self._start_again(steady)
        return None

    def _failure(self, words: str, steady: bool) -> Ending | None:
        self._failures = 1 if steady else self._failures + 1
        self.counts["failures"] += 1
        if self._failures > self._retries:
            return Ending(GAVE_UP, f"{words}; gave up after {self._failures} in a row")
        self._say(f"{words}; failure {self._failures} in a row, up to {self._retries} are retried")
        return None

    def _unreachable(self, words: str) -> Ending | None:
        """Machines that should answer do not: a while later they are replaced."""
        first = self._since.setdefault("silent", self._clock.now())
        self._tell(words + (f" ({self._gcloud.trouble})" if self._gcloud.trouble else ""))
        if self._clock.now() - first < _PATIENCE_SECONDS:
            return None
        self._since.clear()
        if ending := self._failure(f"{words} for {_PATIENCE_SECONDS / 60:.0f} minutes", False):
            return ending
        self.counts["slices replaced"] += 1
        self._gcloud.delete(self._request.name)
        return None

    # ------------------------------------------------------------------------------------ the end
    def _stop_in_time(self, resource: Resource | None) -> Ending:
        """The budget is nearly spent: lets the training save, and ends."""
        if resource is not None and resource.state == cloud.ACTIVE and self._prepared:
            self._say("the budget is nearly spent: stopping the training, which saves")
            until = self._clock.now() + self._grace
            try:
                reports = self._job.stop("TERM")
                while self._clock.now() < until and (
                    len(reports) < self._hosts or any(r.state == "running" for r in reports)
                ):
                    self._clock.sleep(min(self._poll, 15))
                    # If nobody answered, perhaps nobody was asked.
                    reports = self._job.status() if reports else self._job.stop("TERM")
                if len(reports) == self._hosts and all(r.code == DONE for r in reports):
                    return Ending(DONE, "the training is done")
            except GcloudError as error:
                self._say(f"gcloud: {error}")
        return Ending(
            BUDGET_SPENT,
            f"the budget of {self._max_hours:.4g} hours is spent; the same command, with another "
            "budget, continues from the last checkpoint",
        )

    def _delete_for_good(self) -> bool:
        """Deletes, and believes it only when gcloud finds nothing any more."""
        for attempt in range(20):
            try:
                if self._look() is None:
                    return True
                self._gcloud.delete(self._request.name)
                if self._look() is None:
                    return True
            except GcloudError as error:
                self._say(f"gcloud: {error}; trying again")
            self._clock.sleep(min(self._poll * 2**attempt, _LONGEST_PAUSE))
        return False

    def _still_there(self) -> str:
        """What goes on costing money, and the command that ends it."""
        delete = self._gcloud.line(Gcloud.delete_arguments(self._request.name))
        try:
            resource = self._gcloud.describe(self._request.name)
        except (GcloudError, UserError) as error:
            return (
                f"NOT KNOWN whether {self._request.name} still exists ({error}); if it does it "
                f"costs ${self._cost.per_hour:,.2f} an hour; to delete it:\n  {delete}"
            )
        if resource is None:
            return f"{self._request.name} does not exist: nothing costs money"
        costs = "costs nothing now, but may become machines"
        if resource.costs:
            costs = f"costs ${self._cost.per_hour:,.2f} an hour"
        return (
            f"STILL THERE: {resource.name} is {resource.state}, {self._request.chips:,} chips, and "
            f"{costs}; a training on it goes on. The same command attends to it again, and with "
            f"--spent-hours {self._hours():.2f} within the same budget. To delete it:\n  {delete}"
        )

    # ---------------------------------------------------------------------------------- small parts
    def _look(self) -> Resource | None:
        resource = self._gcloud.describe(self._request.name)
        self._meter.look(self._clock.now(), resource)
        return resource

    def _hours(self) -> float:
        return self._meter.hours(self._clock.now())

    def _show_logs(self, reports: list[Report]) -> None:
        hosts = {r.host for r in reports[:3]}
        try:
            lines = self._job.logs(30).splitlines()
        except GcloudError as error:
            self._say(f"the logs cannot be read: {error}")
            return
        for line in lines:
            if any(f"{host}: " in line for host in hosts):
                self._say(line)

    def _tell(self, words: str) -> None:
        """Says it unless it was the last thing told."""
        if words != self._told:
            stamp = time.strftime("%m-%d %H:%M", time.gmtime(self._clock.now()))
            self._say(f"{stamp} {words}")
        self._told = words

    def _summary(self) -> str:
        hours = self._hours()
        what = ", ".join(f"{count} {name}" for name, count in self.counts.items())
        return (
            f"deleted: nothing costs money any more. Machines existed for {hours:,.1f} hours, "
            f"${hours * self._cost.per_hour:,.2f} at your price ({what or 'nothing was made'})"
        )

    @staticmethod
    def _how(report: Report) -> str:
        return "was lost" if report.state == "lost" else f"exit code {report.code}"
