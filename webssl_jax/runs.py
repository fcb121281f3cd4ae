"""A run on disk, ``workdir``: its lock, its identity, its config, its weights.

run = runs.load_run("RUN", step=None, mesh=None)
run.method.encode(run.variables, images)
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from webssl_jax import config as configs
from webssl_jax import environment, methods, train_state, workdirs
from webssl_jax import params as paths
from webssl_jax.checkpoints import Checkpointer, CheckpointError, directory
from webssl_jax.cli import first_line
from webssl_jax.config import ConfigError, UserError
from webssl_jax.data import mixture
from webssl_jax.data.identity import Identity
from webssl_jax.data.mixture import Mixture
from webssl_jax.data.sources import ArrayRecordSource, Shard
from webssl_jax.files import write_json
from webssl_jax.methods.base import Method, Variables
from webssl_jax.models.sizes import ViTConfig
from webssl_jax.optim.optimizer import Optimizer
from webssl_jax.sharding import distributed
from webssl_jax.sharding import mesh as meshes
from webssl_jax.train_step import run_schedules
from webssl_jax.weights import patches
from webssl_jax.weights.load import Loaded
from webssl_jax.weights.networks import Networks

Records = ArrayRecordSource | Mixture
_OF_A_HOST = re.compile(
    r"data\.(train|workers|threads|read_ahead)|mixture\..*\.(train|selection)"
    r"|host\.compilation_cache|checkpoint\.local_folder"
)
log = logging.getLogger(__name__)


def checkpointer(workdir: str | os.PathLike, *, restore_once: bool = False) -> Checkpointer:
    """The checkpoints of a run, for reading, wherever its config put them.

    Raises:
      UserError: if ``workdir`` is not a run.
    """
    folder, owner = read_config(workdir).checkpoint.folder, Path(workdir) / workdirs.OWNER
    return Checkpointer(
        workdir,
        folder=folder,
        read_only=True,
        restore_once=restore_once,
        run=owner.read_text().strip() if owner.exists() else "",
    )


def weights_of_run(workdir: str, abstract: dict[str, Any], encoder: ViTConfig) -> dict[str, Any]:
    """The newest good weights of another run, for ``config.init_from``.

    Learned positions of another grid are resized to the grid of ``encoder``, patches of another
    size to its own (weights/patches.py). All other arrays must have the shapes of ``abstract``,
    {"params": ..., "teacher": ...}.

    Raises:
      UserError: if there is no such run or checkpoint, or it does not fit.
    """
    theirs = methods.create(read_config(workdir)).encoder
    old, new, fits, done = theirs.grid, encoder.grid, {}, []
    if old != new and "pos_embed" in abstract["params"]["encoder"]:
        shape: tuple[int, ...] = (1, theirs.num_positions, theirs.width)
        fits["encoder/pos_embed"] = (
            shape,
            functools.partial(encoder.interpolation.resize_table, old=old, new=new),
        )
        mode = encoder.position_resize
        done.append("positions resized from {}x{} to {}x{} patches ({})".format(*old, *new, mode))
    if theirs.patch_size != encoder.patch_size:
        side = theirs.patch_size
        inverse = patches.matrix(side, encoder.patch_size).astype(np.float32)
        fits["encoder/patch_embed/kernel"] = (
            (side, side, 3, theirs.width),
            functools.partial(
                jnp.einsum, "ia,jb,abcd->ijcd", inverse, inverse, precision="highest"
            ),
        )
        done.append(f"patches resampled from {side} to {encoder.patch_size} pixels")

    def part(path: str) -> str:
        return path.partition("/")[2]  # without "params" or "teacher"

    def stored(path: str, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return leaf.update(shape=fits[part(path)][0]) if part(path) in fits else leaf

    def fitted(path: str, leaf: jax.Array) -> jax.Array:
        if part(path) not in fits:
            return leaf
        return jax.jit(fits[part(path)][1], out_shardings=leaf.sharding)(leaf)

    weights = checkpointer(workdir).restore_newest(paths.map_with_path(stored, abstract))
    if weights is None:
        raise UserError(f"config.init_from = {workdir}: has no checkpoint")
    log.info("starting from the weights of %s%s", workdir, "".join(f"; {what}" for what in done))
    return paths.map_with_path(fitted, weights)


def open_encoder(workdir: str, mesh: jax.sharding.Mesh | None = None) -> Loaded | None:
    """The encoder that a run's method evaluates (of Web-DINO the teacher's), of its newest good
    checkpoint, as weights for ``init_from``; None for what is no run.

    Args:
      mesh: over which its leaves are cut, over the hosts too; one device when None.

    Raises:
      UserError: if there is no good checkpoint.
    """
    if not workdirs.is_run(workdir):
        return None
    run = load_run(workdir, mesh=mesh)
    tree = getattr(run.variables, run.method.evaluated)
    networks = Networks(run.method.encoder, preprocess=run.method.preprocess)
    kind = f"a run of {run.config.method.name}, step {run.step}"
    return Loaded(kind, networks, {"encoder": tree["encoder"]}, workdir, "", "float32")


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained run, loaded for evaluation or export by :func:`load_run`."""

    workdir: str
    config: ConfigDict
    step: int
    method: Method
    variables: Variables


def write_config(workdir: Path, config: ConfigDict) -> None:
    """Writes ``config.json``, resolved, and ``environment.json``: versions, machine, git revision,
    devices. All processes call it; the first one writes."""
    with distributed.error_barrier():
        if jax.process_index() == 0:
            write_json(workdir / "config.json", configs.resolved(config))
            devices = {"count": jax.device_count(), "kind": jax.devices()[0].device_kind}
            write_json(workdir / "environment.json", environment.describe() | {"devices": devices})


def read_config(workdir: str | os.PathLike) -> ConfigDict:
    """The resolved config that a run wrote at its start.

    Raises:
      UserError: if ``workdir`` is not a run.
    """
    path = epath.Path(workdir) / "config.json"
    if not path.exists():
        raise UserError(f"{workdir}: is not a run: it has no config.json")
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: its JSON cannot be read ({error})") from None
    # exported weights have a config.json too
    groups = ("method", "model", "optim", "checkpoint")
    if not isinstance(values, dict) or not all(isinstance(values.get(g), dict) for g in groups):
        raise UserError(f"{workdir}: is not a run: its config.json is another program's")
    try:
        return configs.from_resolved(values)
    except ValueError as error:
        raise UserError(f"{path}: is not the config of a run ({error})") from None


def refuse_another(
    workdir: Path, config: ConfigDict, flag: str, saved_elsewhere: bool = False
) -> None:
    """Refuses to continue the run of ``workdir`` with a config that is not its own.

    What defines the batches and arrays of a run must stay. Other changes are logged. A run that has
    no checkpoint may start anew with any config.

    Args:
      flag: what named ``workdir``, for messages.
      saved_elsewhere: whether there are local checkpoints.

    Raises:
      ConfigError: for the key that differs.
      UserError: as :func:`read_config`.
    """
    if not (workdir / "config.json").exists():
        found = directory(workdir)  # who owns config.checkpoint.folder says claim_folder
        if flag == "--workdir" and any(found.glob("[0-9]*")):
            raise UserError(
                f"{found}: holds checkpoints, but {workdir} has no config.json, so whose they are "
                "is not known; put it back, or go on in a new workdir with --config.resume_from"
            )
        return
    earlier = read_config(workdir)
    folder = earlier.checkpoint.folder
    if not saved_elsewhere and not any(directory(workdir, folder).glob("[0-9]*")):
        return
    if flag == "--workdir" and folder != config.checkpoint.folder:
        raise ConfigError(
            f"config.checkpoint.folder = {config.checkpoint.folder!r}: the checkpoints of this run "
            f"lie in {directory(workdir, folder)}; leave it as it was, or use another workdir with "
            "--config.resume_from"
        )
    changed = [
        (key, f"config.{key}: {before} -> {after}")
        for key, before, after in configs.differences(
            earlier.to_dict(), configs.from_resolved(configs.resolved(config)).to_dict()
        )
    ]
    fixed = [
        words
        for key, words in changed
        if _defines_a_run(key) or _changes_the_mixture(key) and not config.data.allow_change
    ]
    if fixed:
        more = f" and {len(fixed) - 8} more" if len(fixed) > 8 else ""
        raise ConfigError(
            f"{workdir} ({flag}) was started with other settings: {', '.join(fixed[:8])}{more}; "
            "put them back, or use another workdir, with --config.init_from to take its weights"
        )
    for _, words in changed:
        log.info("changed: %s", words)


def _defines_a_run(key: str) -> bool:
    groups = ("seed", "global_batch", "method", "model")
    return key.split(".")[0] in groups and key not in configs.COSTS


def _changes_the_mixture(key: str) -> bool:
    """Where its shards lie may change."""
    return key.startswith("mixture") and not key.endswith(".train")


def log_changes(workdir: Path, config: ConfigDict, method: Method, step: int) -> None:
    """Warns when a run goes on at ``step`` with other versions of packages than at its last start,
    or with schedules that jump there, as they do in a run that is made longer."""
    if step == 0 or jax.process_index() > 0:
        return
    if not (workdir / "config.json").exists():
        if not config.resume_from:  # a stage of continue_from is to have schedules of its own
            return
        workdir = Path(config.resume_from)
    for words in (*_changed_versions(workdir), *_jumps(read_config(workdir), config, method, step)):
        log.warning("%s", words)


def _changed_versions(workdir: Path) -> list[str]:
    try:
        before = dict(json.loads((workdir / "environment.json").read_text())["packages"])
    except (OSError, ValueError, KeyError, TypeError):
        return [f"{workdir}/environment.json: cannot be read, so the versions before are not known"]
    now = environment.package_versions()
    changed = [
        f"{name} {was} -> {now[name]}"
        for name, was in before.items()
        if name in now and now[name] != was
    ]
    if not changed:
        return []
    return [f"packages have changed since the last start: {', '.join(changed)}; losses may differ"]


def _jumps(earlier: ConfigDict, config: ConfigDict, method: Method, step: int) -> list[str]:
    try:
        before = run_schedules(earlier, method)
    except (AttributeError, KeyError) as error:
        return [f"the schedules before are not known: config.json lacks {first_line(error)}"]
    found = []
    for name, schedule in run_schedules(config, method).items():
        last, due, now = (
            float(f(jnp.int32(at)))  # steps count from 0 here
            for f, at in ((before[name], step - 1), (before[name], step), (schedule, step))
        )
        if abs(now - due) > 1e-5 * abs(due):
            found.append(f"{name} jumps from {last:.3g} at step {step:,} to {now:.3g}")
    if not found:
        return []
    return [
        f"the schedules have changed: {', '.join(found)} at step {step + 1:,}; with "
        "config.optim.lr_schedule = constant a run can be made longer without a jump"
    ]


def open_records(config: ConfigDict, workdir: Path) -> Records:
    """The records that a run trains on, with the patience and the losses that its config allows.

    Raises:
      ConfigError: for a row of ``config.mixture``.
      UserError, TransientError: as :class:`ArrayRecordSource` and :class:`Mixture`.
    """
    identity = _known_records(config, workdir)
    known = identity.shards if identity else ()
    data, memory = config.data, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    def source(pattern: str, known: Sequence[Shard], parts: int = 1) -> ArrayRecordSource:
        return ArrayRecordSource(
            pattern,
            patience=60 * data.retry_minutes,
            max_lost=data.max_lost_shards,
            known=known,
            # in all of the processes of this machine together, a quarter of its memory
            memory=memory // 4 // (data.workers + 1) // parts,
        )

    if not config.mixture:
        return source(data.train, known)
    parts = mixture.parts(config.mixture)
    sources = [source(part.train, mixture.shards_of(part, known), len(parts)) for part in parts]
    return Mixture(parts, sources, config.global_batch, configs.total_steps(config))


def _known_records(config: ConfigDict, workdir: Path) -> Identity | None:
    """What the run, or the one that it continues, was trained on."""
    found = Identity.read(workdir / workdirs.DATA)
    if found is None and (other := config.resume_from or config.continue_from):
        found = Identity.read(Path(other) / workdirs.DATA)
    return found


def check_records(config: ConfigDict, workdir: Path, records: Identity, step: int) -> None:
    """Refuses to go on at ``step`` with other records than those that the run was trained on: none
    of its batches would be the one that is due. All processes call it; the first one writes
    ``data.json``.

    Raises:
      UserError: if they have changed, and ``config.data.allow_change`` is not set.
    """
    with distributed.error_barrier():
        before = _known_records(config, workdir) if step else None
        changes = before.changes(records) if before else []
        where = "config.mixture" if config.mixture else f"config.data.train = {config.data.train}"
        words = f"the records of {where} are not those that the run was trained on until step "
        words += f"{step:,}: {'; '.join(changes)}"
        if changes and not config.data.allow_change:
            raise UserError(
                f"{words}; put them back, or go on with other batches by "
                "--config.data.allow_change=true"
            )
        if changes:
            log.warning("%s; going on (config.data.allow_change)", words)
        if step and before is None:
            log.warning(
                "%s has no %s: changed records would not be noticed", workdir, workdirs.DATA
            )
    with distributed.error_barrier():  # behind the one above: others still read it there
        if jax.process_index() == 0 and (
            changes or not step or not (workdir / workdirs.DATA).exists()
        ):
            records.write(workdir / workdirs.DATA)


def settings(config: ConfigDict, flags: Mapping[str, Any]) -> dict[str, str]:
    """What must not differ between the processes of a run: flags, config, code and packages. Keys
    that may: those of speed, and folders of a machine's own. (Records are compared themselves.)"""
    found = {f"--{name}": str(value) for name, value in flags.items()}
    found |= {
        f"config.{key}": repr(value)
        for key, value in configs.leaves(config)
        if not _OF_A_HOST.fullmatch(key)
    }
    found |= {f"the version of {name}": v for name, v in environment.package_versions().items()}
    return found | {"the code of webssl_jax": environment.code_digest()}


def load_run(
    workdir: str | os.PathLike, step: int | None = None, mesh: jax.sharding.Mesh | None = None
) -> Run:
    """Loads the variables of a run's checkpoint.

    Args:
      step: of the checkpoint; the newest good one when None.
      mesh: what the variables are sharded over; one device when None.

    Raises:
      UserError: if there is no such run or checkpoint.
    """
    config = read_config(workdir)
    method = methods.create(config)
    if mesh is None:
        mesh = meshes.create(
            ConfigDict({"replica": 1, "fsdp": 1, "tensor": 1}), jax.local_devices()[:1]
        )
    optimizer = Optimizer.from_config(config.optim, method.tables())
    whole = train_state.abstract(method, optimizer, config.seed, config.global_batch, mesh)
    template = {name: getattr(whole, name) for name in ("step", "params", "teacher", "aux")}
    saved = checkpointer(workdir)
    if not saved.steps():
        raise CheckpointError(f"{workdir}: has no checkpoint yet")
    if step is None:
        state = saved.restore_newest(template)
        assert state is not None  # there are checkpoints
    elif step in saved.steps():
        state = saved.restore(step, template)
    else:
        raise CheckpointError(
            f"{workdir}: has no checkpoint of step {step}; there are "
            f"{', '.join(map(str, saved.steps()))}"
        )
    saved.close()
    variables = Variables(state["params"], state["teacher"], state["aux"])
    return Run(os.fspath(workdir), config, int(state["step"]), method, variables)
