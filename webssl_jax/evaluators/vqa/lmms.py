"""Our models for lmms-eval, which has tasks that are not here:

    pip install --no-deps lmms-eval==0.7.3
    python -m lmms_eval --model webssl_jax --model_args model=RUN --tasks pope --batch_size 32

lmms-eval finds this file by the entry point of the package (setup.py), and imports torch itself;
nothing is computed with it. Its rules are its own: figures of the 16 benchmarks of the paper come
from ``vqa/tasks``.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from ml_collections import ConfigDict

from webssl_jax import model as models
from webssl_jax.data.turns import IMAGE
from webssl_jax.errors import UserError
from webssl_jax.evaluators.vqa.ask import Answerer
from webssl_jax.evaluators.vqa.task import Question
from webssl_jax.sharding import mesh as meshes

NEW_TOKENS = 128  # of an answer, where a task does not say


def manifest() -> ModelManifest:
    """What lmms-eval registers."""
    return ModelManifest("webssl_jax", simple_class_path=f"{__name__}.{WebSSL.__name__}")


class WebSSL(lmms):
    """A run of configs/vqa.py on all devices of this process.

    model: the run. step: a checkpoint; by default the newest. batch_size: questions a call.
    max_batch_size, device: lmms-eval gives them to every model; they mean nothing here.

    Raises:
      UserError: for a model that answers no questions, or several processes.
    """

    is_simple = True

    def __init__(
        self,
        model: str,
        step: int | None = None,
        batch_size: int | str = 32,
        max_batch_size: Any = None,
        device: Any = None,
    ):
        super().__init__()
        if jax.process_count() > 1:
            raise UserError("lmms-eval: one process asks; webssl evaluate has several")
        mesh = meshes.create(ConfigDict({"replica": 1, "fsdp": -1, "tensor": 1}))
        self._answerer = Answerer(models.load(model, step, mesh), int(batch_size))

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Greedy answers, in the order of the requests.

        Raises:
          UserError: for a question about several images or a video, or one that asks for chance.
        """
        questions, stops = [], []
        for number, request in enumerate(requests):
            text, options, show, place, task, split = request.args
            key = f"{task}, {split} {place}"
            _refuse_chance(key, options)
            shown = show(self.task_dict[task][split][place]) or []
            image = _image(key, shown)
            text = text.replace(IMAGE, "").strip()
            new = int(options.get("max_new_tokens") or NEW_TOKENS)
            questions.append(Question(key, text, image, {"number": number}, new))
            stops.append(_words(options.get("until")))
        found = [""] * len(questions)
        for part, said in self._answerer(questions, [question.image for question in questions]):
            for question, answer in zip(part, said):
                number = question.extra["number"]
                found[number] = _until(answer, stops[number])
        return found

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Not here.

        Raises:
          UserError: always.
        """
        raise UserError("lmms-eval: this model writes answers; take a task of generate_until")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not here.

        Raises:
          UserError: always.
        """
        raise UserError("lmms-eval: this model answers one question; take a task of generate_until")


def _refuse_chance(key: str, options: Mapping[str, Any]) -> None:
    if options.get("do_sample") or int(options.get("num_beams") or 1) > 1:
        raise UserError(
            f"{key}: asks for samples or beams, and answers are greedy here; "
            "--gen_kwargs do_sample=False,num_beams=1"
        )


def _image(key: str, shown: Sequence[Any]) -> bytes | None:
    """The file of the one image, without loss."""
    if not shown:
        return None
    if len(shown) > 1 or not hasattr(shown[0], "save"):
        raise UserError(f"{key}: shows {len(shown)} images, or no image; this model looks at one")
    file = io.BytesIO()
    shown[0].convert("RGB").save(file, "PNG", compress_level=1)
    return file.getvalue()


def _words(until: Any) -> list[str]:
    return [until] if isinstance(until, str) else list(until or ())


def _until(answer: str, stops: Sequence[str]) -> str:
    """Up to the first of ``stops``."""
    for stop in filter(None, stops):
        answer = answer.partition(stop)[0]
    return answer.strip()
