"""Both towers of a method that has texts (CLIP): images and texts as unit vectors of one space."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from webssl_jax.config import UserError
from webssl_jax.data.tokens import VOCABULARY, Tokenizer
from webssl_jax.evaluators.features import in_batches
from webssl_jax.methods.base import Method, Variables
from webssl_jax.sharding import mesh as meshes


class Towers(NamedTuple):
    """images: (n, H, W, 3) uint8 -> (n, E) float32; texts: tokens (m, C) int32 -> (m, E) float32.
    Both L2-normalised. All processes call them, with the same rows, and each gets all results."""

    images: Callable[[np.ndarray], np.ndarray]
    texts: Callable[[np.ndarray], np.ndarray]


def has_texts(method: Method) -> bool:
    """Whether ``method`` has a text tower (``embed_images``, ``embed_texts`` and ``text``), and one
    whose ids are those of our tokenizer."""
    return hasattr(method, "embed_texts") and method.text.vocabulary == VOCABULARY


def tokenize(method: Method, texts: Sequence[str]) -> np.ndarray:
    """(n, C) int32, as the method's text tower takes them."""
    return Tokenizer(method.text.context, method.padding)(texts)


def tower_functions(method: Method, mesh: Mesh, batch: int) -> Callable[[Variables], Towers]:
    """``bind(variables) -> Towers``, compiled once for all steps, ``batch`` rows a call; ``batch``
    must divide over the mesh."""

    def compiled(tower: Callable) -> Callable:
        def compute(params, rows):
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # for models/layers.on_batch
                return tower(params, rows)

        return jax.jit(compute, out_shardings=meshes.replicated(mesh))

    embed_images, embed_texts = compiled(method.embed_images), compiled(method.embed_texts)

    def bind(variables: Variables) -> Towers:
        def embed(tower: Callable, rows: np.ndarray) -> np.ndarray:
            out = []
            for part, n in in_batches(rows, batch):
                placed = meshes.from_whole(part, mesh)
                out.append(np.asarray(tower(variables.params, placed), np.float32)[:n])
            return np.concatenate(out)

        return Towers(
            lambda images: embed(embed_images, images), lambda tokens: embed(embed_texts, tokens)
        )

    return bind


def check_finite(what: str, *embeddings: np.ndarray) -> None:
    """Refuses what cannot be compared.

    Raises:
      UserError: naming ``what`` was to be measured.
    """
    if not all(np.isfinite(x).all() for x in embeddings):
        raise UserError(
            f"{what}: NaN or infinity in the embeddings; the network has diverged, or its number "
            "format is too small for it"
        )
