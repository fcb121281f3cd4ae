"""What an evaluation is: one file with its typed options, and a row in a config.

    config.evals = {"topics": {"kind": "knn", "train": "a-*", "test": "b-*", "every_steps": 0}}

An evaluation is made from its options and run on models. It sees a ``Model``, never a method, a
workdir or a training step. To add one, write a file here with a class that follows
:class:`Evaluation` and name it in ``suite.KINDS``; or name it in the row itself, as ``kind =
"my_module:MyEvaluation"``. CONTRIBUTING.md has an example.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

from webssl_jax.evaluators.datasets import Dataset
from webssl_jax.evaluators.features import Cache
from webssl_jax.evaluators.outcome import Outcome
from webssl_jax.model import Model
from webssl_jax.models.features import Want
from webssl_jax.weights.networks import Networks

FEATURES, TEXTS, LANGUAGE = "features", "texts", "language"


class Evaluation(Protocol):
    """The contract.

      Options: a frozen dataclass whose fields are the keys of the row, with their defaults; its
        ``__post_init__`` raises ValueError for what cannot be.
      needs: what a model must have: ``features``, ``texts``, ``language``.
    data: a fingerprint of the records it judges by; an outcome of others is not taken for done.

      A kind that does more on devices than have those features made may say so by a class method
      ``work(options, model, size)``, for ``plan``: see ``work.py``.

      It is made by ``Evaluation(options)``, which opens its data and raises UserError for data from
      which no figure can come.
    """

    Options: ClassVar[type]
    needs: ClassVar[frozenset[str]]
    data: str

    def __init__(self, options: Any): ...

    @classmethod
    def want(cls, options: Any, networks: Networks) -> Want | None:
        """The pooled features of an image that it needs; None for none. ``plan`` asks it too,
        without data."""

    @property
    def datasets(self) -> Sequence[Dataset]:
        """The records that it needs those features of; rows that want parts of the same features of
        the same records share one extraction."""

    def run(self, model: Model, cache: Cache) -> Outcome:
        """Evaluates a model. All processes call it, and all get the same outcome.

        Raises:
          UserError: if no figure can come from this model on these data; one line.
        """
