"""Publishing weights: of a run with its figures in a model card, or of a weight file that is only
converted, tensor by tensor; and on the hub of Hugging Face."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from webssl_jax import config as configs
from webssl_jax import environment, methods, runs, workdirs
from webssl_jax.config import UserError
from webssl_jax.evaluators import outcome, tables
from webssl_jax.methods.base import initial_weights
from webssl_jax.model import Model, Origin
from webssl_jax.telemetry.writer import read_rows
from webssl_jax.weights import card, export, load, safetensors_io
from webssl_jax.weights.card import Named
from webssl_jax.weights.families import FAMILIES, Family, Licence
from webssl_jax.weights.load import Loaded
from webssl_jax.weights.networks import Networks
from webssl_jax.weights.stored import WeightsError

_LOSS = (
    "training loss of one batch; for MAE the mean squared error of the hidden patches, in units of "
    "each patch's own variance when `norm_pix_loss` is on (1.0 = predicting the patch's mean); for "
    "DINO the sum of cross-entropies in nats between what student and teacher make of an image's "
    "crops, which start near the logarithm of the number of prototypes; for CLIP the contrast of "
    "each image's own caption with all others of the batch, which starts near the logarithm of the "
    "batch (near 10 or 11 with SigLIP's sigmoid); docs/health.md of webssl_jax says what it is for "
    "other methods"
)
_NAMES = {
    "encoder": "an encoder",
    "decoder": "a decoder",
    "dino_head": "heads",
    "text": "a text tower",
}


def export_run(
    run: Any,
    family: str,
    output: str | os.PathLike,
    dtype: str = "float32",
    max_file_bytes: int = safetensors_io.MAX_FILE_BYTES,
    chunks: int | None = None,
    tree: str | None = None,
    named: Named | None = None,
) -> pathlib.Path:
    """Writes what a run (:class:`~webssl_jax.runs.Run`) left, with its figures in the card; see
    ``weights.export.write``.

    tree: of the run's variables, ``params`` (the student) or ``teacher``; by default the one that
      the method says is evaluated.
    """
    tree = tree or run.method.evaluated
    origin = Origin(run.workdir, run.step)
    model = Model(Networks.of(run.method), getattr(run.variables, tree), origin)

    def readme() -> str:
        return run_card(run, model, tree, FAMILIES[family], dtype, named or Named.of(output))

    return export.write(
        model.params, model.networks, family, output, dtype, max_file_bytes, readme, chunks
    )


def export_loaded(
    loaded: Loaded,
    family: str,
    output: str | os.PathLike,
    dtype: str = "float32",
    max_file_bytes: int = safetensors_io.MAX_FILE_BYTES,
    chunks: int | None = None,
    named: Named | None = None,
) -> pathlib.Path:
    """Writes weights of another family, from ``load.open_`` or ``load.load``; see
    ``weights.export.write``.

    Raises:
      WeightsError: also when ``family`` has networks that the weights have not.
    """
    for part in FAMILIES[family].needs if family in FAMILIES else ():
        if getattr(loaded.networks, part) is None:
            raise WeightsError(f"{family}: needs {_NAMES[part]}, and {loaded.source} has none")
    source = pathlib.Path(loaded.source).absolute()
    # replacing it would delete what is read
    if pathlib.Path(output).resolve() in (source.resolve(), source.parent.resolve()):
        raise WeightsError(f"--output {output}: the weights are read from there; name another")

    def readme() -> str:
        origin = Origin(loaded.source, None, loaded.family)
        own = named or Named.of(output)
        return card.card(loaded.networks, origin, FAMILIES[family], dtype, own)

    return export.write(
        loaded.params, loaded.networks, family, output, dtype, max_file_bytes, readme, chunks
    )


def push(folder: pathlib.Path, repository: str) -> str:
    """Uploads an export to the hub of Hugging Face, as a private model unless it is there already.

    repository: ORGANISATION/NAME. Returns its address.

    Raises:
      UserError: if huggingface_hub is missing, nobody is logged in, or the hub refuses.
    """
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError(f"--push needs huggingface_hub: pip install '.[hub]' ({error})") from error
    try:
        api = huggingface_hub.HfApi()
        address = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message="Weights of webssl_jax"
        )
    # of its own and of the network's; ValueError: a name that cannot be one
    except (huggingface_hub.errors.HfHubHTTPError, OSError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"--push {repository}: {reason}; the export is whole in {folder}. Log in with "
            "`hf auth login`, or set HF_TOKEN"
        ) from error
    return str(address)


def run_card(run: Any, model: Model, tree: str, family: Family, dtype: str, named: Named) -> str:
    """README.md of a run for a folder of ``family``. tree: which of the run's variables it holds.
    It names no folder of this machine."""
    method = run.method
    licence = _licence_of(str(run.config.get("init_from") or ""), method)
    if licence and named.licence is None:
        named = dataclasses.replace(named, licence=licence.name, link=licence.link)
    texts = model.text is not None
    labels = "label" in method.batch_spec(1)
    seen = "on images with captions" if texts else "with labels" if labels else "without labels"
    workdir = pathlib.Path(run.workdir)
    kind = type(method).__name__
    sort = "image-text" if texts else "supervised" if labels else "self-supervised"
    tags = sort if sort == kind.lower() else f"{sort}, {kind.lower()}"
    resolved = json.dumps(_public(configs.resolved(run.config)), indent=2, sort_keys=True)
    name = run.config.get("name") or "webssl_jax"
    whose = "; these are the weights of the teacher, the student's running average"
    if tree != "teacher":
        whose = "; these are the weights of the student" if method.evaluated == "teacher" else ""
    return f"""\
{card.head(tags, family, named)}
# {name}, step {run.step:,}

A vision transformer trained {seen} by \
webssl_jax ({kind}{whose}){", and its text tower" if "text" in family.needs else ""}:
{card.network_and_use(model.networks, family, dtype, named)}
## Figures of this run

{loss_table(read_rows(workdir / "metrics.jsonl"), run.step)}

{evaluation(workdir, run.step)}

## How it was made

- step {run.step:,} of {configs.total_steps(run.config):,}
- images a step: {run.config.global_batch:,}
- training images: `{_public(run.config.data.train)}`
- git revision of the training code: {_training_revision(workdir)}
- git revision of the exporting code: {environment.git_revision()}

<details><summary>Resolved config</summary>

```json
{resolved}
```

</details>
"""


def _licence_of(init_from: str, method: Any) -> Licence | None:
    """The licence of the weights that a run began with, if their format has one: what is made of
    them comes under it. Files that are gone say nothing."""
    for path in filter(None, (*init_from.split(","), *initial_weights(method).values())):
        try:
            if workdirs.is_run(path):
                earlier = runs.read_config(path)
                found = _licence_of(earlier.get("init_from", ""), methods.create(earlier))
            else:
                found = load.best_family(load.open_files(path)).licence
        except (UserError, OSError):
            continue
        if found:
            return found
    return None


def _public(value: Any) -> Any:
    """A config's value without folders and buckets, which are nobody's business but the owner's:
    of each path the last part."""
    if isinstance(value, Mapping):
        return {key: _public(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_public(one) for one in value]
    if isinstance(value, str):
        return ",".join(part.rstrip("/").rpartition("/")[2] for part in value.split(","))
    return value


def loss_table(rows: Sequence[Mapping[str, float]], step: int) -> str:
    """A Markdown table of the first and the last training loss up to ``step``, with what it is."""
    found = [row for row in rows if row["step"] <= step and "train/loss" in row]
    if not found:
        return "This run logged no figures up to this step."
    first, last = (f"{row['train/loss']:.4f} ({row['step']:,})" for row in (found[0], found[-1]))
    return "\n".join(
        [
            "| figure | first (step) | last (step) | what it means |",
            "|---|---|---|---|",
            f"| `train/loss` | {first} | {last} | {_LOSS} |",
        ]
    )


def evaluation(workdir: pathlib.Path, step: int) -> str:
    """The newest evaluation up to ``step``, beside what needs no training and the untrained
    network, as a code block."""
    folder = workdir / "eval"
    done = [at for at in outcome.row_steps(folder) if at <= step]
    if not done:
        return (
            "This run was not evaluated up to this step (`python -m webssl_jax.evaluate` does it)."
        )
    now = done[-1]
    models = {"step 0 (untrained)": outcome.read_rows(folder, 0)} if 0 in done and now else {}
    models[f"step {now:,} (this model)"] = outcome.read_rows(folder, now)
    heading = f"Evaluation at step {now:,}, beside what needs no training:"
    return f"{heading}\n\n```\n{tables.report(models)}\n```"


def _training_revision(workdir: pathlib.Path) -> str:
    path = workdir / "environment.json"
    if not path.exists():
        return "not recorded"
    return json.loads(path.read_text()).get("git_revision", "not recorded")
