"""Our models under lmms-eval, beside a stand-in of its base class: the package asks for 53 more."""

import abc
import dataclasses
import sys
import types

import numpy as np
import pytest
from PIL import Image

from tests.methods.small_vqa import fresh, make, tokenizer_folder
from webssl_jax.config import UserError
from webssl_jax.data.decode import decode_image
from webssl_jax.model import Model, Origin
from webssl_jax.weights.networks import Networks


class Lmms(abc.ABC):
    """What lmms-eval 0.7.3 has in ``lmms_eval/api/model.py``."""

    def __init__(self):
        self._rank, self._world_size, self.task_dict = 0, 1, {}

    @abc.abstractmethod
    def loglikelihood(self, requests): ...

    @abc.abstractmethod
    def generate_until(self, requests): ...

    @abc.abstractmethod
    def generate_until_multi_round(self, requests): ...


@dataclasses.dataclass(frozen=True)
class Manifest:
    model_id: str
    simple_class_path: str | None = None


@pytest.fixture
def lmms(monkeypatch):
    for name, fields in {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.api.model": {"lmms": Lmms},
        "lmms_eval.models": {},
        "lmms_eval.models.registry_v2": {"ModelManifest": Manifest},
    }.items():
        module = types.ModuleType(name)
        vars(module).update(fields)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "webssl_jax.evaluators.vqa.lmms", raising=False)
    from webssl_jax.evaluators.vqa import lmms

    return lmms


@pytest.fixture
def asked(lmms, monkeypatch, tmp_path):
    """A model of theirs, which says what it was shown."""
    method = make(tokenizer_folder(tmp_path))
    model = Model(Networks.of(method), fresh(method), Origin("small"))
    monkeypatch.setattr(lmms.models, "load", lambda path, step, mesh: model)
    monkeypatch.setattr(
        lmms.Answerer,
        "_answer",
        lambda self, part, images: [
            f"{q.text} {q.max_new_tokens} {_colour(image)}\n\nso" for q, image in zip(part, images)
        ],
    )
    return lmms.WebSSL("RUN", batch_size="2", device="cpu")


def _colour(image):
    return image and np.asarray(decode_image(image))[0, 0].tolist()


def request(text, place, **options):
    arguments = (text, options, lambda doc: doc["images"], place, "pope", "test")
    return types.SimpleNamespace(args=arguments)


DOCS = [
    {"images": [Image.new("RGBA", (3, 2), (9, 8, 7, 255))]},
    {"images": []},
    {"images": [Image.new("L", (2, 2), 5)]},
    {"images": [Image.new("L", (2, 2))] * 2},
]


def test_answers_come_in_the_order_of_the_requests_and_end_where_a_task_says(lmms, asked):
    asked.task_dict = {"pope": {"test": DOCS}}
    requests = [
        request("<image>\nwhat, in many words?", 0, until=["\n\n"], do_sample=False),
        request("who?", 1, until="\n\n", max_new_tokens=7),
        request("where?", 2),
    ]
    assert asked.generate_until(requests) == [
        f"what, in many words? {lmms.NEW_TOKENS} [9, 8, 7]",
        "who? 7 None",
        f"where? {lmms.NEW_TOKENS} [5, 5, 5]\n\nso",
    ]
    assert lmms.manifest().simple_class_path == "webssl_jax.evaluators.vqa.lmms.WebSSL"


def test_what_the_model_cannot_do_is_refused_in_a_line(asked):
    asked.task_dict = {"pope": {"test": DOCS}}
    for options, place, why in (
        ({}, 3, "pope, test 3: shows 2 images"),
        ({"do_sample": True}, 0, "asks for samples or beams"),
        ({"num_beams": 3}, 0, "asks for samples or beams"),
    ):
        with pytest.raises(UserError, match=why):
            asked.generate_until([request("?", place, **options)])
    for refused in (asked.loglikelihood, asked.generate_until_multi_round):
        with pytest.raises(UserError, match="take a task of generate_until"):
            refused([])
