"""Asks a model questions about images, in batches of fixed shapes on all devices, and keeps the
answers in a file of lines. What is in the file is not asked again, so a run that was killed goes
on.

Shape letters: B questions, T tokens of a prompt.
"""

from __future__ import annotations

import functools
import itertools
import logging
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from webssl_jax.data.decode import DecodeError, decode_image
from webssl_jax.data.dialogues import see
from webssl_jax.errors import UserError
from webssl_jax.evaluators.vqa.task import Answer, Question, read_answers
from webssl_jax.language import answers as answering
from webssl_jax.language import generate as generating
from webssl_jax.language.dialogue import PADDING, Dialogue, seen_cells
from webssl_jax.model import Model, fill_up
from webssl_jax.models import pixels
from webssl_jax.sharding import distributed
from webssl_jax.sharding import mesh as meshes
from webssl_jax.telemetry.progress import Progress
from webssl_jax.weights.networks import Networks

log = logging.getLogger(__name__)
# As they are asked; without any image; each with the image of another question.
SEEING, BLIND, SHUFFLED = CONDITIONS = ("seeing", "blind", "shuffled")
BUCKET = 32  # prompts are padded to multiples of so many tokens, so that few lengths are compiled
CHUNK = 256  # questions that are held at a time; images are exchanged among them


def ask(
    model: Model,
    questions: Iterable[Question],
    path: pathlib.Path,
    batch: int,
    condition: str = SEEING,
    new_tokens: int = 0,
) -> list[Answer]:
    """The answers to all questions, kept in ``path`` as they come. All processes call it.

    Args:
      batch: questions a call. condition: one of :data:`CONDITIONS`. new_tokens: most tokens of an
        answer; 0 for each question's own number.

    Raises:
      UserError: for a model that answers no questions, an image that cannot be decoded, a prompt
        that does not fit the model, or a file with answers to other questions.
    """
    answerer = Answerer(model, batch, new_tokens)
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = {answer.key: answer for answer in _kept(path)}
    progress = Progress(None, f"asking ({condition}):", "questions")
    found: list[Answer] = []
    before: list[Question] = []
    for chunk in _chunks(iter(questions)):
        done = {q.key: kept.pop(q.key) for q in chunk if q.key in kept}
        strange = [q.key for q in chunk if q.key in done and done[q.key].text != q.text]
        if strange:
            raise UserError(
                f"{path}: its answer {strange[0]} is to another question; move the file away"
            )
        if condition == BLIND:
            images: list[bytes | None] = [None] * len(chunk)
        else:
            shuffled = condition == SHUFFLED
            images = exchanged(chunk, before) if shuffled else [q.image for q in chunk]
        before = chunk
        rest = [(q, image) for q, image in zip(chunk, images) if q.key not in done]
        for part, said in answerer([q for q, _ in rest], [image for _, image in rest]):
            fresh = [question.answered(text) for question, text in zip(part, said)]
            with distributed.error_barrier():
                if jax.process_index() == 0:
                    with open(path, "a", encoding="utf-8") as file:
                        file.writelines(answer.line() for answer in fresh)
            done |= {answer.key: answer for answer in fresh}
            progress.update(len(part))
        found += [done[question.key] for question in chunk]
    progress.close()
    if not found:
        raise UserError(f"{path}: there is no question")
    answerer.log_lengths()
    return found


def _chunks(questions: Iterator[Question]) -> Iterator[list[Question]]:
    while chunk := list(itertools.islice(questions, CHUNK)):
        yield chunk


def _kept(path: pathlib.Path) -> list[Answer]:
    """The whole lines of a file, without one that a kill cut off; the same on all processes."""
    with distributed.error_barrier():
        if jax.process_index() == 0 and path.exists():
            data = path.read_bytes()
            whole = data[: data.rfind(b"\n") + 1]
            if whole != data:
                path.write_bytes(whole)
    there = path.exists() and path.stat().st_size > 0
    return read_answers(path) if distributed.first_says(there) else []


def exchanged(questions: Sequence[Question], before: Sequence[Question] = ()) -> list[bytes | None]:
    """For each question the image of one half a list further on, or of the next after it that has
    another, or of one of those ``before`` the list, which may be short; its own where no other has
    another."""
    count = len(questions)
    found = []
    for i, question in enumerate(questions):
        turned = (questions[(i + count // 2 + k) % count] for k in range(count))
        others = (one.image for one in itertools.chain(turned, before))
        another = (x for x in others if x is not None and x != question.image)
        found.append(question.image and next(another, question.image))
    return found


class Answerer:
    """A model that is asked. All processes call it with the same questions."""

    def __init__(self, model: Model, batch: int, new_tokens: int = 0):
        self._model, self._new_tokens = model, new_tokens
        self._networks, self._dialogue = model.networks, dialogue_of(model)
        assert self._networks.connector and self._networks.language  # they go with a dialogue
        self._shape = self._networks.connector.shape
        self._context = self._networks.language.context
        self._speaker = self._dialogue.speaker
        self._batch = model.rounded_batch(batch)
        self._prompts: list[int] = []  # tokens of each, and of the answer
        self._answers: list[int] = []
        self._cut = 0

    def __call__(
        self, questions: Sequence[Question], images: Sequence[bytes | None]
    ) -> Iterator[tuple[Sequence[Question], list[str]]]:
        """Questions of a batch and the answers to them, one batch after the other. Short ones come
        first, as a batch is as long as its longest."""
        lengths = [(q.max_new_tokens, len(self._dialogue.prompt(q.text, None))) for q in questions]
        order = sorted(range(len(questions)), key=lambda i: lengths[i])
        for start in range(0, len(order), self._batch):
            places = order[start : start + self._batch]
            part = [questions[i] for i in places]
            yield part, self._answer(part, [images[i] for i in places])

    def log_lengths(self) -> None:
        """Says how long prompts and answers were so far."""
        if self._prompts:
            log.info(
                "prompts of %d to %d tokens, %.0f in the mean; answers of %d to %d, %.1f in the "
                "mean; %d of %d cut at their limit",
                *(min(self._prompts), max(self._prompts), np.mean(self._prompts)),
                *(min(self._answers), max(self._answers), np.mean(self._answers)),
                *(self._cut, len(self._answers)),
            )

    def _answer(self, part: Sequence[Question], images: Sequence[bytes | None]) -> list[str]:
        made = [self._prompt(question, image) for question, image in zip(part, images)]
        new = self._new_tokens or max(question.max_new_tokens for question in part)
        longest = max(len(ids) for ids, _ in made)
        length = -(-longest // BUCKET) * BUCKET
        if length + new > self._context:
            raise UserError(
                f"question {max(zip(made, part), key=lambda x: len(x[0][0]))[1].key}: its prompt "
                f"of {longest} tokens and an answer of {new} do not fit the model's context of "
                f"{self._context}"
            )
        tokens = np.full((len(part), length), PADDING, np.int32)
        for row, (ids, _) in zip(tokens, made):
            row[length - len(ids) :] = ids
        pictures = np.stack([picture for _, picture in made])
        inputs = {"images": fill_up(pictures, self._batch), "tokens": fill_up(tokens, self._batch)}
        mesh = self._model.mesh
        placed = {
            name: jnp.asarray(x) if mesh is None else meshes.from_whole(x, mesh)
            for name, x in inputs.items()
        }
        program = _program(mesh, self._networks, new, self._speaker.end_ids)
        found = jax.tree.map(meshes.whole, program(self._model.params, **placed))
        # As if it had been asked alone: its own number, where others may have longer answers.
        most = [self._new_tokens or question.max_new_tokens for question in part]
        said = [row[: min(n, m)] for row, n, m in zip(found.tokens, found.lengths, most)]
        self._prompts += [len(ids) for ids, _ in made]
        self._answers += map(len, said)
        self._cut += sum(row[-1] not in self._speaker.end_ids for row in said)
        return [self._speaker.decode(row).strip() for row in said]

    def _prompt(self, question: Question, image: bytes | None) -> tuple[list[int], np.ndarray]:
        """Its tokens, and the image as the encoder takes it (black where there is none)."""
        size = self._model.preprocess.shape[0]
        if image is None:
            ids = self._dialogue.prompt(question.text, None)
            return ids, np.zeros((size, size, 3), np.uint8)
        try:
            opened = decode_image(image)
        except DecodeError as error:
            raise UserError(
                f"question {question.key}: its image cannot be decoded ({error}); download the "
                "benchmark again"
            ) from error
        cells = seen_cells(*opened.size, self._shape, self._dialogue.unpad)
        picture = see(opened, size, self._model.preprocess.mean)
        return self._dialogue.prompt(question.text, cells), picture


def dialogue_of(model: Model) -> Dialogue:
    """How a model is spoken to.

    Raises:
      UserError: for one that answers no questions.
    """
    if model.networks.dialogue is None:
        raise UserError(f"{model.origin.name}: has no language model; give a run of configs/vqa.py")
    return model.networks.dialogue


@functools.lru_cache(maxsize=32)
def _program(
    mesh: Mesh | None, networks: Networks, new_tokens: int, end_ids: tuple[int, ...]
) -> Any:
    """The jitted function from parameters, images (B, H, W, 3) uint8 and tokens (B, T) to
    ``generate.Generated``."""
    assert networks.language and networks.preprocess
    language, preprocess = networks.language, networks.preprocess

    def compute(params: Any, images: jax.Array, tokens: jax.Array) -> generating.Generated:
        seen = pixels.normalise(images, preprocess.mean, preprocess.std)
        cells = answering.image_cells(networks, params, seen)  # type: ignore[arg-type]  # none of its three is None
        return generating.generate(
            language,
            params["language"],
            None,
            answering.real(tokens),
            jax.random.key(0),
            np.array(end_ids, np.int32),
            new_tokens=new_tokens,
            embeddings=answering.place(params["language"], tokens, cells),
        )

    if mesh is None:
        return jax.jit(compute)

    def on_mesh(*arguments: Any, **named: Any) -> generating.Generated:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # for models/layers.on_batch
            return compute(*arguments, **named)

    return jax.jit(on_mesh, out_shardings=meshes.batch_sharding(mesh))
