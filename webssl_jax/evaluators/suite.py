"""From rows of a config to outcomes on disk.

    suite = Suite(config.evals, workdir / "eval" / ".cache")
    outcomes = suite.run(model, workdir / "eval", step)   # {row: Outcome}; all processes call it

What was done before for the same weights, options and data is read and not done again. What was
interrupted goes on from the features that are there.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import logging
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from webssl_jax.config import ConfigError, TransientError, UserError, suggest
from webssl_jax.evaluators import features, outcome
from webssl_jax.evaluators.base import FEATURES, LANGUAGE, TEXTS, Evaluation
from webssl_jax.evaluators.datasets import Dataset
from webssl_jax.evaluators.features import Cache
from webssl_jax.evaluators.outcome import Outcome
from webssl_jax.model import Model
from webssl_jax.models.features import Want
from webssl_jax.models.sizes import construct
from webssl_jax.sharding import distributed
from webssl_jax.weights.networks import Networks

# kind -> "module:class". Imported when used, so that what an evaluation needs is its own.
KINDS = {
    "alignment": "webssl_jax.evaluators.alignment.platonic:Alignment",
    "attentive": "webssl_jax.evaluators.probes.attentive:Attentive",
    "depth": "webssl_jax.evaluators.dense.depth:Depth",
    "knn": "webssl_jax.evaluators.probes.knn:KNN",
    "knn_segmentation": "webssl_jax.evaluators.dense.knn:KNNSegmentation",
    "linear": "webssl_jax.evaluators.probes.linear:Linear",
    "logistic": "webssl_jax.evaluators.probes.logistic:LogisticRegression",
    "mae_linear": "webssl_jax.evaluators.probes.mae_linear:MAELinear",
    "retrieval": "webssl_jax.evaluators.texts.retrieval:Retrieval",
    "segmentation": "webssl_jax.evaluators.dense.segmentation:Segmentation",
    "vqa": "webssl_jax.evaluators.vqa.evaluation:VQA",
    "zero_shot": "webssl_jax.evaluators.texts.zero_shot:ZeroShot",
}
# Keys that every row has besides its options.
SHARED = {"kind": "", "every_steps": 0}
_NEEDS: dict[str, Callable[[Networks], bool]] = {
    FEATURES: lambda networks: networks.encoder is not None,
    TEXTS: lambda networks: networks.has_tokenizer,
    LANGUAGE: lambda networks: networks.dialogue is not None,
}
_WORDS = {
    FEATURES: "no image encoder",
    TEXTS: "no text tower with CLIP's tokenizer",
    LANGUAGE: "no language model",
}
Rows = Mapping[str, Mapping[str, Any]]
log = logging.getLogger(__name__)


class FailedRows(Exception):
    """Rows that have failed, when all others were done.

    found: {row: outcome} of the others. failed: {row: its error}.
    """

    def __init__(self, found: Mapping[str, Outcome], failed: Mapping[str, Exception]):
        self.found, self.failed = dict(found), dict(failed)
        super().__init__("; ".join(f"{row}: {words(error)}" for row, error in failed.items()))


class RefusedRows(FailedRows, UserError):
    """For what a user can mend."""


class RowsForNow(FailedRows, TransientError):
    """For trouble that may pass."""


def failure(found: Mapping[str, Outcome], failed: Mapping[str, Exception]) -> FailedRows:
    """The error of all ``failed`` rows, of the kind of the gravest."""
    kind: type[FailedRows] = FailedRows
    for better in (UserError, TransientError):
        if all(isinstance(error, better) for error in failed.values()):
            kind = RefusedRows if better is UserError else RowsForNow
    made = kind(found, failed)
    made.__cause__ = next((e for e in failed.values() if not isinstance(e, UserError)), None)
    return made


def words(error: Exception) -> str:
    """One line."""
    line = " ".join(str(error).split())
    return line if isinstance(error, UserError) else f"{type(error).__name__}: {line}"


def find(kind: str, where: str) -> type[Evaluation]:
    """The class behind ``kind``: a name in :data:`KINDS`, or ``module:class``.

    Raises:
      ConfigError: naming ``where``, if there is none.
    """
    place = KINDS.get(kind, kind)
    module, colon, name = place.partition(":")
    if not colon:
        raise ConfigError(f"{where}.kind = {kind!r}: {suggest(kind, KINDS)}; or module:class")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{where}.kind = {kind!r}: cannot be imported ({error})") from error


def complete(rows: Rows, where: str = "config.evals") -> dict[str, dict[str, Any]]:
    """Rows with every key of their kind, defaults where they say nothing.

    Raises:
      ConfigError: for a kind or a key that is not there.
    """
    out = {}
    for name, row in rows.items():
        if "kind" not in row:
            raise ConfigError(f"{where}.{name}: has no kind; known: {', '.join(KINDS)}")
        kind = find(row["kind"], f"{where}.{name}")
        own = {
            field.name: "" if field.default is dataclasses.MISSING else field.default
            for field in dataclasses.fields(kind.Options)
        }
        unknown = sorted(set(row) - set(own) - set(SHARED))
        if unknown:
            raise ConfigError(
                f"{where}.{name}.{unknown[0]}: a row of kind {row['kind']!r} has no such key; "
                f"{suggest(unknown[0], (*own, *SHARED))}"
            )
        out[name] = SHARED | own | dict(row)
    return out


def options_of(row: Mapping[str, Any], where: str) -> Any:
    """A complete row's typed options.

    Raises:
      ConfigError: for a value that cannot be.
    """
    kind = find(row["kind"], where)
    values = {key: value for key, value in row.items() if key not in SHARED}
    try:
        return construct(kind.Options, values, "options")
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None


def check(rows: Rows, where: str = "config.evals") -> None:
    """Refuses rows that cannot be, before anything is opened.

    Raises:
      ConfigError: for the first of them.
    """
    for name, row in complete(rows, where).items():
        if not name.isidentifier():
            raise ConfigError(f"{where}.{name}: a row's name must be letters, digits and _")
        if type(row["every_steps"]) is not int or row["every_steps"] < 0:
            raise ConfigError(
                f"{where}.{name}.every_steps = {row['every_steps']!r}: must be zero or positive"
            )
        options_of(row, f"{where}.{name}")


def check_needs(rows: Rows, networks: Networks, who: str, where: str = "config.evals") -> None:
    """Refuses networks that lack what a row needs. who: whose networks they are, for the message.

    Raises:
      ConfigError: for the first such row.
    """
    for name, row in complete(rows, where).items():
        for need in sorted(find(row["kind"], f"{where}.{name}").needs):
            if not _NEEDS[need](networks):
                raise ConfigError(
                    f"{where}.{name}: {who} has {_WORDS[need]}; leave this row ({row['kind']}) out"
                )


class Suite:
    """The evaluations that ``rows`` ask for.

    Args:
      rows: {name: row}; see ``base.py``.
      cache: a folder for features while they are of use, and for the figures of trivial ones. All
        processes see it.
      batch: images a call of the network. threads: decoding threads a process.

    Raises:
      ConfigError, UserError: for rows, files or shards from which no figure can come.
    """

    def __init__(self, rows: Rows, cache: pathlib.Path, batch: int = 256, threads: int = 16):
        check(rows)
        self.rows = complete(rows)
        self._cache = Cache(cache, batch, threads)
        self._options = {
            name: options_of(row, f"config.evals.{name}") for name, row in self.rows.items()
        }
        self._made: dict[str, Evaluation] = {
            name: find(self.rows[name]["kind"], f"config.evals.{name}")(options)
            for name, options in self._options.items()
        }

    def due(self, step: int, last: bool = False) -> list[str]:
        """The rows whose cadence asks for ``step``; all of them at the first and the last."""
        return [
            name
            for name, row in self.rows.items()
            if last or step == 0 or row["every_steps"] and step % row["every_steps"] == 0
        ]

    def run(
        self, model: Model, folder: pathlib.Path, step: int = 0, names: Iterable[str] | None = None
    ) -> dict[str, Outcome]:
        """{row: outcome} of ``names`` (None: all), each kept in ``folder/ROW`` as soon as it is
        there. step: of a run; 0 of weights that have none.

        Raises:
          FailedRows: if no figure can come from this model on some rows' data, or an outcome cannot
            be written; once all other rows are done. With several processes an error that not all
            of them have raised ends the run instead.
          UserError: if processes have other data, or a file of before is damaged.
        """
        found: dict[str, Outcome] = {}
        known = {name: self._known(name, model) for name in (self.rows if names is None else names)}
        # Rows too: processes whose paths differ would wait for each other at saves of heads.
        settings = {f"the row {name}": json.dumps(facts["row"]) for name, facts in known.items()}
        settings |= {
            f"what the evaluation {name} finds": str(facts["data"]) for name, facts in known.items()
        }
        distributed.check_same(settings)
        todo = []
        for name, facts in known.items():
            done = self._done(outcome.step_path(folder / name, step), facts)
            if done is None:
                todo.append(name)
            else:
                found[name] = done
        failed = self._extract(model, todo)
        for name in todo:
            if name in failed:
                continue
            try:
                made = self._made[name].run(model, self._cache)
                with distributed.error_barrier():
                    if jax.process_index() == 0:
                        made.write(outcome.step_path(folder / name, step), known[name])
            except Exception as error:
                failed[name] = _noted(name, error)
            else:
                found[name] = made
        found = {name: found[name] for name in known if name in found}
        if failed:
            distributed.raise_together(failure(found, failed))
        self._cache.forget(model)
        return found

    def _extract(self, model: Model, names: Iterable[str]) -> dict[str, Exception]:
        """All pooled features that several rows want, at once. Returns {row: error} of those whose
        features cannot be had."""
        asked: dict[str, tuple[Dataset, list[Want]]] = {}
        for name in names:
            evaluation = self._made[name]
            want = evaluation.want(self._options[name], model.networks)
            if want is None:
                continue
            for dataset in evaluation.datasets:
                asked.setdefault(dataset.identity, (dataset, []))[1].append(want)
        failed: dict[str, Exception] = {}
        for identity, (dataset, wants) in asked.items():
            if len(wants) > 1:
                try:
                    self._cache.pooled(model, dataset, features.union(wants))
                except Exception as error:
                    on = [
                        n for n in names if identity in (d.identity for d in self._made[n].datasets)
                    ]
                    failed |= {name: _noted(name, error) for name in on}
        return failed

    def _known(self, name: str, model: Model) -> dict[str, Any]:
        """What an outcome depends on, as it is read back from JSON."""
        known = {
            "row": {key: x for key, x in self.rows[name].items() if key != "every_steps"},
            "data": self._made[name].data,
            "weights": model.fingerprint,
            "preprocess": repr(model.preprocess),
        }
        return json.loads(json.dumps(known))

    def _done(self, path: pathlib.Path, known: Mapping[str, Any]) -> Outcome | None:
        before = outcome.read_known(path)
        if distributed.first_says(before == known):
            return outcome.read(path)
        if before is not None:
            other = ", ".join(key for key in known if before.get(key) != known[key])
            log.warning("%s is of other %s: it will be replaced", path, other)
        return None


def _noted(row: str, error: Exception) -> Exception:
    """``error``, if all processes have it and can go on."""
    if not distributed.is_raised_on_all(error):
        raise error
    log.warning("the evaluation %s has failed, and the others go on: %s", row, words(error))
    return error


def metrics(outcomes: Mapping[str, Outcome]) -> dict[str, float]:
    """``eval/ROW/METRIC`` of all rows, for the log of a run."""
    return {key: value for row, one in outcomes.items() for key, value in one.named(row).items()}
