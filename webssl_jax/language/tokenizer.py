"""Tokenizers of language models: ``tokenizer.json`` by the library ``tokenizers``, or the
vocabulary in a GGUF file; and chat templates, rendered by jinja as ``transformers`` renders them.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np

from webssl_jax.errors import UserError
from webssl_jax.language.gguf_file import INSTALL, PACKAGED, GGUFFile, packaged_file
from webssl_jax.weights import safetensors_io
from webssl_jax.weights.stored import WeightsError, shown

if TYPE_CHECKING:
    import jinja2
    import tokenizers

Messages = Sequence[Mapping[str, Any]]  # {"role": ..., "content": ...} each
FILE = "tokenizer.json"
_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")
_CONTROL = 3  # GGUF's type of tokens that are no text


class Batch(NamedTuple):
    """Texts as the decoder reads them: ids (B, T) int32, 0 where there is padding, and mask (B, T)
    bool."""

    ids: np.ndarray
    mask: np.ndarray


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Text to ids and back.

    inner: of the library ``tokenizers``. special: {"bos_token": "<s>", ...}, as templates see them.
    end_ids: tokens that end an answer. chat_template: jinja, or None. where: the file, for errors.
    """

    inner: tokenizers.Tokenizer
    special: dict[str, str]
    end_ids: tuple[int, ...]
    chat_template: str | None
    where: str

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Ids of a text; with ``special`` what the model wants before and after it."""
        return self.inner.encode(text, add_special_tokens=special).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without special tokens."""
        return self.inner.decode(list(map(int, ids)), skip_special_tokens=True)

    def check_fits(self, vocabulary: int) -> None:
        """Raises WeightsError if it has ids that a model of ``vocabulary`` ids does not know."""
        largest = max(self.inner.get_vocab().values())
        if largest >= vocabulary:
            raise WeightsError(
                f"{self.where}: its ids reach {largest}, the weights know {vocabulary} (0 to "
                f"{vocabulary - 1}); this tokenizer is another model's"
            )

    def render(self, messages: Messages, add_generation_prompt: bool = True) -> str:
        """A conversation as the text that the model was trained on.

        Raises:
          UserError: if there is no template, it refuses the conversation (a role it does not know),
            or leaves out a message.
        """
        if self.chat_template is None:
            raise UserError(f"{self.where}: has no chat template; give plain texts")
        import jinja2

        if not messages or not all({"role", "content"} <= set(one) for one in messages):
            raise UserError("a conversation: each message needs a 'role' and a 'content'")
        try:
            text = _compile(self.chat_template).render(
                messages=[dict(one) for one in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.special,
            )
        except (jinja2.TemplateError, TypeError) as error:
            roles = ", ".join(str(one["role"]) for one in messages)
            raise UserError(
                f"{self.where}: the chat template refuses the roles {shown(roles)} ({shown(error)})"
            ) from None
        for one in messages:
            asked = one["role"] != "assistant" and isinstance(one["content"], str)
            if asked and one["content"].strip() not in text:
                raise UserError(
                    f"{self.where}: the chat template has no place for a message of the role "
                    f"{shown(one['role'])!r}; leave it out, or put it into another message"
                )
        return text


def pad(rows: Sequence[Sequence[int]], side: str = "left", multiple: int = 1) -> Batch:
    """Lists of ids as one batch; its length is the longest of them, rounded up to ``multiple``.

    Raises:
      ValueError: for an unknown side.
    """
    if side not in ("left", "right"):
        raise ValueError(f"side = {side!r} is not one of left, right")
    length = -(-max(1, *map(len, rows)) // multiple) * multiple
    ids = np.zeros((len(rows), length), np.int32)
    mask = np.zeros(ids.shape, bool)
    for i, row in enumerate(rows):
        place = slice(length - len(row), length) if side == "left" else slice(len(row))
        ids[i, place], mask[i, place] = row, True
    return Batch(ids, mask)


def open_(path: str | os.PathLike) -> Tokenizer:
    """The tokenizer of a language model, without its weights: of a folder of transformers, of a
    ``.gguf`` file (a ``tokenizer.json`` beside it goes first), or ``smollm2``.

    Raises:
      WeightsError: if there is none, or it cannot be read.
    """
    place = packaged_file() if path == PACKAGED else pathlib.Path(path)
    if place.suffix != ".gguf":
        return read_folder(place)
    if (place.parent / FILE).is_file():
        return read_folder(place.parent)
    if not place.is_file():
        raise WeightsError(f"{place}: no such file")
    return read_gguf(GGUFFile(place))


def read_folder(folder: pathlib.Path) -> Tokenizer:
    """The tokenizer in a folder of transformers.

    Raises:
      WeightsError: if ``tokenizer.json`` is missing or cannot be read.
    """
    library, file = _library(folder), folder / FILE
    if not file.is_file():
        raise WeightsError(f"{folder}: has no {FILE}; put the one of this model there")
    try:
        inner = library.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises no other type
        raise WeightsError(f"{file}: cannot be read ({shown(error)})") from None
    inner.no_padding()
    inner.no_truncation()
    config = _json(folder / "tokenizer_config.json")
    special = {}
    for name in _SPECIAL:
        value = config.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            special[name] = value
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = next((t["template"] for t in template if t["name"] == "default"), None)
    own = folder / "chat_template.jinja"  # where transformers 5 keeps it
    if own.is_file():
        template = own.read_text("utf-8")
    return Tokenizer(inner, special, _end_ids(folder, inner, special), template, str(file))


def _end_ids(
    folder: pathlib.Path, inner: tokenizers.Tokenizer, special: Mapping[str, str]
) -> tuple[int, ...]:
    for name in ("generation_config.json", "config.json"):
        found = _json(folder / name).get("eos_token_id")
        if found is not None:
            return tuple(found) if isinstance(found, list) else (found,)
    end = inner.token_to_id(special["eos_token"]) if "eos_token" in special else None
    return () if end is None else (end,)


def _json(file: pathlib.Path) -> dict[str, Any]:
    return safetensors_io.parse_json(file) if file.is_file() else {}


def write_folder(tokenizer: Tokenizer, folder: pathlib.Path) -> None:
    """Writes the files that transformers reads: ``tokenizer.json``, its config, the chat template,
    and which tokens end an answer."""
    text = tokenizer.inner.to_str(pretty=True)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **tokenizer.special}
    if tokenizer.chat_template is not None:
        config["chat_template"] = tokenizer.chat_template
    files = {FILE: text, "tokenizer_config.json": json.dumps(config, indent=2) + "\n"}
    if tokenizer.end_ids:
        ends = {"eos_token_id": list(tokenizer.end_ids)}
        files["generation_config.json"] = json.dumps(ends, indent=2) + "\n"
    for name, content in files.items():
        safetensors_io.write_text(folder / name, content)


def read_gguf(file: GGUFFile) -> Tokenizer:
    """The tokenizer in a GGUF file: byte-level BPE, with digits one by one (SmolLM2). transformers
    passes over how GGUF says that texts are split, and differs after two spaces before a number.

    Raises:
      WeightsError: for another kind.
    """
    library = _library(file.path)
    kind, split = file.field("tokenizer.ggml.model"), file.field("tokenizer.ggml.pre")
    if (kind, split) != ("gpt2", "smollm"):
        raise WeightsError(
            f"{file.path}: its tokenizer ({shown(kind)}, {shown(split)}) cannot be read from GGUF; "
            f"put the {FILE} of this model beside the file"
        )
    names = file.field("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in file.field("tokenizer.ggml.merges")]
    vocabulary = {name: i for i, name in enumerate(names)}
    inner = library.Tokenizer(library.models.BPE(vocabulary, merges))
    parts = library.pre_tokenizers
    inner.pre_tokenizer = parts.Sequence(
        [parts.Digits(individual_digits=True), parts.ByteLevel(add_prefix_space=False)]
    )
    inner.decoder = library.decoders.ByteLevel()
    types = file.field("tokenizer.ggml.token_type")
    control = [name for name, kind in zip(names, types) if kind == _CONTROL]
    inner.add_special_tokens([library.AddedToken(name, normalized=False) for name in control])
    ids = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    found = {ours: file.field(f"tokenizer.ggml.{theirs}_token_id") for ours, theirs in ids.items()}
    special = {f"{name}_token": names[i] for name, i in found.items() if i is not None}
    ends = () if found["eos"] is None else (int(found["eos"]),)
    template = file.field("tokenizer.chat_template")
    return Tokenizer(inner, special, ends, template, str(file.path))


def _library(where: object) -> Any:
    try:
        import jinja2  # noqa: F401  (of chat templates; said here rather than at the first of them)
        import tokenizers
    except ImportError as error:
        raise WeightsError(f"{where}: needs the package {error.name}; {INSTALL}") from None
    return tokenizers


@functools.cache
def _compile(template: str) -> jinja2.Template:
    """As transformers does: sandboxed, with its filters and functions, and with the tag
    ``generation``, which marks what an assistant says and prints as it is."""
    from jinja2 import TemplateError, ext, nodes, sandbox

    class Generation(ext.Extension):
        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    def refuse(message: str) -> NoReturn:
        raise TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(template)
