"""An evaluation in one file, as anybody may add one: how grey the images are, and how long their
features."""

import dataclasses

import numpy as np

from webssl_jax.evaluators import datasets
from webssl_jax.evaluators.outcome import Outcome, scored
from webssl_jax.models.features import Want

PROTOCOL = 1


@dataclasses.dataclass(frozen=True)
class Options:
    """test: labelled shards. scale: what lengths are multiplied by. blocks: looked at too."""

    test: str
    scale: float = 1.0
    blocks: tuple[int, ...] = ()

    def __post_init__(self):
        if self.scale <= 0:
            raise ValueError(f"scale = {self.scale} must be positive")


class Toy:
    """The length of the CLS token."""

    Options = Options
    needs = frozenset({"features"})
    ran = []  # one entry a run, for tests

    def __init__(self, options):
        self._options = options
        self._data = datasets.open_dataset(options.test, datasets.LABELLED)
        self.data, self.datasets = f"{self._data.identity}-{PROTOCOL}", (self._data,)

    @classmethod
    def want(cls, options, networks):
        return Want(patches="none", blocks=options.blocks)

    def run(self, model, cache):
        self.ran.append(model.origin.name)
        store = cache.pooled(model, self._data, self.want(self._options, model.networks))
        lengths = np.linalg.norm(store.array("cls")[:], axis=1) * self._options.scale
        metrics, items = scored("length", lengths)
        picture = {"lengths": np.zeros((4, 4, 3), np.uint8)}
        return Outcome(
            ("length",), metrics, items, self.data, "toy: the length of CLS.", pictures=picture
        )
