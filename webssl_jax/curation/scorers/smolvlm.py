"""The paper's two questions about the text in an image, asked of SmolVLM2 (arXiv 2504.01017,
appendix A): its light filter kept 50.3 % of the images, its heavy filter 1.3 %. The paper says the
questions and the family, not the size of the model.

    pip install 'webssl_jax[export]'    # torch and transformers
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import pyarrow as pa
from PIL import Image

from webssl_jax.config import UserError
from webssl_jax.data.decode import decode_image
from webssl_jax.data.records import Record

# Column: question, word for word as the paper prints it.
QUESTIONS = {
    "text_rich": "Does this image contain any readable text? Answer only yes or no.",
    "chart_like": "Please think carefully before answering. Does this image contain charts, "
    "tables, or documents with readable text? Answer only yes or no.",
}
_ANSWER_TOKENS = 8  # a yes or no is one; the others say what else was answered
_DTYPES = ("bfloat16", "float16", "float32")


@dataclasses.dataclass(frozen=True)
class SmolVLM:
    """For each question 1 (yes), 0 (no) or none (unclear), and the words of the answer, greedily
    decoded; ``text_rich_yes`` and ``chart_like_yes``, how likely the first token of a yes is beside
    that of a no, so that any share can be kept; and ``unclear``, how many of the two answers were
    neither yes nor no.

    model: a folder of transformers, or a name on its hub; any size of the family. side: the longer
    side of the image in pixels, 0 for the model's own (2,048 of the small ones: up to 17 tiles of
    512); the time goes with the tiles. batch: images at a time. device: as torch names it; empty: a
    GPU if there is one.
    """

    model: str = "HuggingFaceTB/SmolVLM2-2.2B-Instruct"
    side: int = 0
    batch: int = 8
    dtype: str = "bfloat16"
    device: str = ""

    version: ClassVar[int] = 2
    workers: ClassVar[int] = 1  # each would hold the whole model
    columns: ClassVar[Mapping[str, pa.DataType]] = {
        **dict.fromkeys(QUESTIONS, pa.int8()),
        **{f"{name}_yes": pa.float32() for name in QUESTIONS},
        **{f"{name}_words": pa.string() for name in QUESTIONS},
        "unclear": pa.int8(),
    }

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise UserError(f"--scorer smolvlm:dtype={self.dtype}: must be {' or '.join(_DTYPES)}")
        if self.batch < 1 or self.side < 0:
            raise UserError("--scorer smolvlm: batch must be at least 1, and side at least 0")

    def __call__(self, records: Sequence[Record]) -> list[dict[str, Any]]:
        images = [decode_image(record.image) for record in records]
        answers = ask(_load(self.model, self.dtype, self.device), images, self.side)
        return [
            _row(dict(zip(answers, one, strict=True)))
            for one in zip(*answers.values(), strict=True)
        ]


def parse(answer: str) -> int | None:
    """1 of an answer that says yes, 0 of no, None of one that says neither, or both."""
    said = set(re.findall(r"\b(?:yes|no)\b", answer.lower()))
    return int("yes" in said) if len(said) == 1 else None


class Answer(NamedTuple):
    """words: decoded. yes: the probability of the first token of a yes, of yes and no together."""

    words: str
    yes: float


def _row(answers: Mapping[str, Answer]) -> dict[str, Any]:
    row: dict[str, Any] = {name: parse(answer.words) for name, answer in answers.items()}
    row["unclear"] = sum(value is None for value in row.values())
    for name, answer in answers.items():
        row |= {f"{name}_words": " ".join(answer.words.split()), f"{name}_yes": answer.yes}
    return row


class Loaded(NamedTuple):
    """The three parts of a model in transformers. transformers' own processor, which joins them,
    would need packages for videos."""

    network: Any
    images: Any
    tokenizer: Any


def ask(loaded: Loaded, images: Sequence[Image.Image], side: int = 0) -> dict[str, list[Answer]]:
    """{question's name: an answer for each image}. The images are encoded once for all questions.

    side: as of :class:`SmolVLM`.
    """
    import torch

    network, tokenizer = loaded.network, loaded.tokenizer
    size = {"size": {"longest_edge": side}} if side else {}
    seen = loaded.images(
        [[image] for image in images], return_row_col_info=True, return_tensors="pt", **size
    )
    pixels = seen["pixel_values"].to(network.device)
    mask = seen["pixel_attention_mask"].to(network.device)
    grids = [(rows[0], cols[0]) for rows, cols in zip(seen["rows"], seen["cols"], strict=True)]
    answers = {}
    with torch.inference_mode():
        parts = network.get_image_features(pixels, mask).pooler_output
        features = torch.cat(list(parts))
        for name, question in QUESTIONS.items():
            texts = [_prompt(loaded, question, grid) for grid in grids]
            given = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
            ids = given["input_ids"].to(network.device)
            known = network.get_input_embeddings()(ids)
            places = (ids == network.config.image_token_id)[..., None]
            made = network.generate(
                inputs_embeds=known.masked_scatter(places, features.to(known.dtype)),
                attention_mask=given["attention_mask"].to(network.device),
                max_new_tokens=_ANSWER_TOKENS,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
                return_dict_in_generate=True,
                output_logits=True,
            )
            words = tokenizer.batch_decode(made.sequences, skip_special_tokens=True)
            first = made.logits[0].float()
            yes, no = (first[:, ids].logsumexp(1) for ids in _first_tokens(tokenizer))
            answers[name] = list(map(Answer, words, torch.sigmoid(yes - no).tolist()))
    return answers


def _first_tokens(tokenizer: Any) -> list[list[int]]:
    """Ids of tokens that a yes may begin with, and of those of a no; none of both."""
    begun = []
    for word in ("yes", "no"):
        texts = [space + form for space in ("", " ") for form in (word, word.title(), word.upper())]
        begun.append({tokenizer.encode(text, add_special_tokens=False)[0] for text in texts})
    return [sorted(own - (begun[0] & begun[1])) for own in begun]


def _prompt(loaded: Loaded, question: str, grid: tuple[int, int]) -> str:
    """The conversation in the model's template, the image as the tokens of its tiles."""
    from transformers.models.smolvlm import processing_smolvlm as own

    content = [{"type": "image"}, {"type": "text", "text": question}]
    text = loaded.tokenizer.apply_chat_template(
        [{"role": "user", "content": content}],
        chat_template=loaded.tokenizer.chat_template or own.DEFAULT_CHAT_TEMPLATE,
        add_generation_prompt=True,
        tokenize=False,
    )
    tokens = own.get_image_prompt_string(
        *grid,
        loaded.network.model.image_seq_len,
        fake_token_around_image="<fake_token_around_image>",
        image_token="<image>",
        global_image_token="<global-img>",
    )
    return text.replace("<image>", tokens, 1)


@functools.lru_cache(1)
def _load(model: str, dtype: str, device: str) -> Loaded:
    """Once in a worker."""
    try:
        import torch
        import transformers
        from transformers.models.smolvlm.image_processing_pil_smolvlm import (
            SmolVLMImageProcessorPil,
        )
    except ImportError:
        raise UserError(
            "--scorer smolvlm: torch or transformers is not installed; pip install "
            "'webssl_jax[export]'"
        ) from None
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        network = transformers.SmolVLMForConditionalGeneration.from_pretrained(
            model, dtype=getattr(torch, dtype)
        )
        # Pillow's, whether or not torchvision is there: the same pixels everywhere.
        images = SmolVLMImageProcessorPil.from_pretrained(model)
        tokenizer = transformers.AutoTokenizer.from_pretrained(model, padding_side="left")
        network = network.to(where).eval()
    except Exception as error:  # it has no common type
        words = " ".join(str(error).split())[:300]
        raise UserError(
            f"--scorer smolvlm:model={model}: cannot be loaded as SmolVLM by transformers ({words})"
        ) from None
    return Loaded(network, images, tokenizer)
