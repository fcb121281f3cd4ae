#!/usr/bin/env python3
"""Trains on Cloud TPU slices through gcloud: from nothing to a finished run, and nothing left over.

    python tools/tpu.py babysit NAME --zone Z --slice v5p-256 --price DOLLARS --max-hours H \
        --config configs/web_dino.py:size=7b --workdir /mnt/bucket/RUN [--config.key=value ...]

NAME is a queued resource: one slice or several (--slices). ``babysit`` does all that follows, again
whenever the slices are taken away, until the training is done or the budget is spent, and deletes
them. By hand:

    create    ask for slices; they cost money from when they are there until they are deleted
    install   this source tree and its environment on every machine (--mount BUCKET=FOLDER: gcsfuse)
    run       start the training on every machine and return
    resume    what is missing of the three: new slices after a preemption, and the same command
    status    what exists and how the training is; watch: again and again
    logs      the end of every machine's log
    stop      let the training save and end
    exec      any command on every machine
    delete    slices and request

All of them ask gcloud how things are, so each can be repeated. --dry-run prints the gcloud commands
and runs none. Prices are yours: --price, dollars a chip and hour, or --prices FILE.json with
{"v5p": {"spot": DOLLARS}}.

Exit codes: 0 done · 1 gave up, or a gcloud command failed · 2 bad input, one line, the training's
too · 3 the budget is spent · 130 stopped by Ctrl-C: it says what is still there, and what it costs.
"""

from __future__ import annotations

import math
import pathlib
import posixpath
import signal
import sys
import time

from webssl_jax import cli
from webssl_jax.config import UserError
from webssl_jax.launch import own_config
from webssl_jax.launch.babysitter import Babysitter
from webssl_jax.launch.cost import Cost, Meter, read_price
from webssl_jax.launch.gcloud import TIERS, Gcloud, GcloudError, Request
from webssl_jax.launch.job import ROOT, Job, train_command
from webssl_jax.sharding import slices

WANTS = ("create", "resume", "babysit")  # commands that may create
RUNS = ("run", "resume", "babysit")  # commands that may start a training
INSTALLS = ("install", "resume", "babysit")


def main(argv: list[str] | None = None) -> int:
    """The entry point. Returns an exit code of the module's docstring."""
    parser = _parser()
    args, overrides = parser.parse_with_overrides(argv)
    if overrides and args.action not in RUNS:
        parser.error(f"--config.{overrides[0]}: only {', '.join(RUNS)} take a config")
    for flag in ("poll_seconds", "max_hours", "max_dollars"):
        value = getattr(args, flag)
        if value is not None and not (math.isfinite(value) and value > 0):
            name = flag.replace("_", "-")
            raise UserError(f"--{name} {value}: give a finite number, more than 0")
    if args.action in INSTALLS and not (ROOT / "setup.py").is_file():
        raise UserError(
            f"{args.action}: brings a checkout to the machines, and this is an installed "
            "package; run tools/tpu.py of a checkout"
        )
    mounts = _mounts(args)
    gcloud = Gcloud(
        args.zone, args.project, dry_run=args.dry_run, ssh_flags=args.ssh_flag, say=_say
    )
    request = cost = None
    if args.action in WANTS:
        request = Request(
            args.name,
            slices.find(args.slice),
            args.slices,
            args.tier,
            args.runtime,
            tuple(args.create_flag),
        )
        cost = Cost(request, read_price(request, args.price, args.prices))
    command, sent = "", {}
    if args.action in RUNS:
        config, sent = _check_config(args, overrides, request)
        if request is not None:
            _check_workdir(args, mounts)
        command = train_command(config, args.workdir, overrides, args.env)
    job = Job(gcloud, args.name, command, mounts, sent)
    try:
        return _ACTIONS[args.action](args, gcloud, job, request, cost)
    except GcloudError as error:
        print(f"gcloud failed: {error}", file=sys.stderr)
        return 1


def _parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=sorted(_ACTIONS))
    parser.add_argument("name", metavar="NAME", help="of the queued resource")
    parser.add_argument("--zone", required=True, help="where the quota or reservation is")
    parser.add_argument("--project", help="unless it is gcloud's default")
    parser.add_argument("--dry-run", action="store_true", help="print gcloud commands, run none")
    parser.add_argument(
        "--ssh-flag", action="append", default=[], help="for ssh and scp: --tunnel-through-iap, ..."
    )
    wanted = parser.add_argument_group(f"what is wanted ({', '.join(WANTS)})")
    wanted.add_argument("--slice", default="", help="v4-N, v5p-N, v5e-N or v6e-N; docs/tpu.md")
    wanted.add_argument("--slices", type=int, default=1, help="how many such slices")
    wanted.add_argument("--tier", default="spot", help=", ".join(TIERS))
    wanted.add_argument("--price", type=float, help="dollars of one chip for one hour")
    wanted.add_argument("--prices", help="JSON file of prices")
    wanted.add_argument("--runtime", default="", help="image, instead of the generation's")
    wanted.add_argument(
        "--create-flag", action="append", default=[], help="for gcloud's create: --network=N, ..."
    )
    runs = parser.add_argument_group(f"the training ({', '.join(RUNS)})")
    runs.add_argument("--config", help="NAME or FILE.py, and [:key=value,...]")
    runs.add_argument("--workdir", help="folder of the run, seen by all machines")
    runs.add_argument(
        "--workdir-is-shared",
        action="store_true",
        help="resume, babysit: the workdir outlives the machines without a --mount (NFS)",
    )
    runs.add_argument("--env", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument(
        "--mount",
        action="append",
        default=[],
        metavar="BUCKET=FOLDER",
        help=f"a bucket as a folder on every machine ({', '.join(INSTALLS)})",
    )
    babysit = parser.add_argument_group("babysit")
    babysit.add_argument("--max-hours", type=float, help="that machines may exist, in all")
    babysit.add_argument("--max-dollars", type=float, help="the same as money, at your price")
    babysit.add_argument(
        "--spent-hours", type=float, default=0.0, help="of the budget, as an earlier one said"
    )
    babysit.add_argument(
        "--meter", type=pathlib.Path, help="file that keeps the hours spent, instead of that"
    )
    babysit.add_argument("--retries", type=int, default=3, help="failures in a row")
    babysit.add_argument("--keep", action="store_true", help="delete nothing at the end")
    parser.add_argument("--poll-seconds", type=float, default=60.0, help="between looks")
    parser.add_argument("--lines", type=int, default=20, help="of each log (logs)")
    parser.add_argument("--command", help="a shell command (exec)")
    return parser


def _check_config(
    args, overrides: list[str], request: Request | None
) -> tuple[str, dict[str, pathlib.Path]]:
    """What the training would refuse after minutes that cost money, it refuses here. Returns the
    ``--config`` of the machines, and files to send."""
    if not args.config or not args.workdir:
        raise UserError(f"{args.action}: give --config and --workdir")
    if not args.workdir.startswith("/"):
        raise UserError(f"--workdir {args.workdir}: give an absolute path, seen by all machines")
    from webssl_jax import methods  # and with it jax
    from webssl_jax.sharding.mesh import check_batch_over, mesh_shape

    config, spec, sent = own_config.prepare(args.config, overrides)
    methods.create(config)
    if request is None:
        return spec, sent
    devices = request.chips * request.slice.chip.devices
    replica, fsdp, _ = mesh_shape(config.sharding, devices)
    if replica % request.slices:
        raise UserError(
            f"config.sharding.replica = {replica}: must be a multiple of the {request.slices} "
            "slices"
        )
    check_batch_over(config, replica * fsdp)
    return spec, sent


def _check_workdir(args, mounts: list[tuple[str, str]]) -> None:
    """Machines are deleted here: a workdir on their own disks would go with them."""
    workdir = pathlib.PurePosixPath(posixpath.normpath(args.workdir))
    if args.workdir_is_shared or any(
        workdir.is_relative_to(posixpath.normpath(folder)) for _, folder in mounts
    ):
        return
    raise UserError(
        f"--workdir {args.workdir}: is in no folder of --mount, so it would be deleted with the "
        "machines; give --mount BUCKET=/FOLDER, or --workdir-is-shared if it outlives them (NFS)"
    )


def _mounts(args) -> list[tuple[str, str]]:
    mounts = []
    for item in args.mount:
        bucket, equals, folder = item.removeprefix("gs://").partition("=")
        if not (bucket and equals and folder.startswith("/")) or "/" in bucket:
            raise UserError(f"--mount {item}: write BUCKET=/FOLDER")
        mounts.append((bucket, folder))
    return mounts


# ------------------------------------------------------------------------------------ the commands
def _create(args, gcloud, job, request, cost) -> int:
    _say(cost.line())
    found = gcloud.describe(request.name)
    if found is not None:
        request.check(found)
        _say(f"{found.name} exists and is {found.state}; nothing was created")
        return 0
    gcloud.create(request)
    _say("in the queue; `status` says when it is ACTIVE, `delete` takes it back")
    return 0


def _install(args, gcloud, job, request, cost) -> int:
    job.install(_hosts(gcloud, args.name))
    return 0


def _run(args, gcloud, job, request, cost) -> int:
    hosts = _hosts(gcloud, args.name)
    reports = job.start(f"hand-{time.time():.0f}")
    if gcloud.dry_run:
        return 0
    other = [r.host for r in reports if r.state == "running" and r.digest != job.digest]
    if other:
        raise UserError(f"{other[0]} runs another command; stop that first")
    if hosts is not None and len(reports) < hosts:
        raise GcloudError(f"{len(reports)} of {hosts} machines answered ({gcloud.trouble})")
    _say(f"running on {len(reports)} machine(s); `watch` and `logs` show it")
    return 0


def _resume(args, gcloud, job, request, cost) -> int:
    return _babysitter(args, gcloud, job, request, cost, max_hours=None, until_running=True)


def _babysit(args, gcloud, job, request, cost) -> int:
    hours = args.max_hours
    if (hours is None) == (args.max_dollars is None):
        raise UserError("babysit: give its budget, either --max-hours or --max-dollars")
    if hours is None:
        hours = args.max_dollars / cost.per_hour
    spent = args.spent_hours
    if not (math.isfinite(spent) and spent >= 0):
        raise UserError(f"--spent-hours {spent}: give a finite number, not less than 0")
    if args.meter and spent:
        raise UserError(f"--spent-hours {spent:g}: --meter {args.meter} knows them; leave one out")
    meter = Meter(time.time(), spent, args.meter)
    return _babysitter(args, gcloud, job, request, cost, max_hours=hours, meter=meter)


def _babysitter(args, gcloud, job, request, cost, **settings) -> int:
    if gcloud.dry_run:  # what it does when all goes well
        _say(cost.line(settings["max_hours"]))
        gcloud.describe(request.name)
        gcloud.create(request)
        job.install()
        job.start("1")
        job.status()
        if args.action == "babysit" and not args.keep:
            gcloud.delete(request.name)
        return 0
    # Whatever ends this program, it says what is still there.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup leaves it
        signal.signal(signal.SIGHUP, signal.default_int_handler)
    babysitter = Babysitter(
        gcloud,
        request,
        job,
        cost,
        say=_say,
        poll_seconds=args.poll_seconds,
        retries=args.retries,
        keep=args.keep,
        **settings,
    )
    return babysitter.run()


def _status(args, gcloud, job, request, cost) -> int:
    found = gcloud.describe(args.name)
    if found is None:
        _say(f"{args.name} does not exist")
        return 0
    _say(f"{found.name}: {found.state}, {len(found.nodes)} x {found.accelerator}")
    if found.state == "ACTIVE":
        reports = job.status()
        for report in reports:
            code = "" if report.code is None else f" with {report.code}"
            _say(f"  {report.host}: {report.state}{code}")
        if not reports:
            _say(f"  no machine answers; is it installed? {gcloud.trouble}")
    return 0


def _watch(args, gcloud, job, request, cost) -> int:
    while True:
        _status(args, gcloud, job, request, cost)
        for line in job.logs(1).splitlines():
            _say(f"  {line}")
        if gcloud.dry_run:
            return 0
        time.sleep(args.poll_seconds)


def _logs(args, gcloud, job, request, cost) -> int:
    _say(job.logs(args.lines).rstrip())
    return _told(gcloud)


def _stop(args, gcloud, job, request, cost) -> int:
    for report in job.stop("TERM"):
        what = "it saves, then ends with 75" if report.state == "running" else "nothing to stop"
        _say(f"{report.host}: {report.state}; {what}")
    return _told(gcloud)


def _exec(args, gcloud, job, request, cost) -> int:
    if not args.command:
        raise UserError("exec: give --command")
    _say(gcloud.ssh(args.name, args.command).rstrip())
    return _told(gcloud)


def _delete(args, gcloud, job, request, cost) -> int:
    gcloud.delete(args.name)
    if not gcloud.dry_run and (found := gcloud.describe(args.name)) is not None:
        raise GcloudError(f"{args.name} is still there: {found.state}; delete it again")
    _say(f"{args.name} does not exist any more")
    return 0


def _told(gcloud: Gcloud) -> int:
    """After a command that may have failed on some machines."""
    if gcloud.trouble:
        raise GcloudError(gcloud.trouble)
    return 0


def _hosts(gcloud: Gcloud, name: str) -> int | None:
    if gcloud.dry_run:
        return None
    found = gcloud.describe(name)
    if found is None or found.state != "ACTIVE":
        raise UserError(f"{name} is {found.state if found else 'not there'}; it must be ACTIVE")
    return gcloud.hosts(found)


def _say(words: str) -> None:
    print(words, flush=True)


_ACTIONS = {
    "create": _create,
    "install": _install,
    "run": _run,
    "resume": _resume,
    "babysit": _babysit,
    "status": _status,
    "watch": _watch,
    "logs": _logs,
    "stop": _stop,
    "exec": _exec,
    "delete": _delete,
}

if __name__ == "__main__":
    cli.run(main)
