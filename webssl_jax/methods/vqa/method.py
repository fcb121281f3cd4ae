"""Visual instruction tuning as Cambrian-1 does it (Tong et al., arXiv 2406.16860, after LLaVA, Liu
et al., arXiv 2310.03744) and the Web-SSL paper measures encoders by it: a frozen vision encoder, a
connector, and a language model that answers questions about images.

The loss is the cross entropy of the next token over the tokens of answers, a mean over all of the
batch. In the first stage the connector alone is trained, in the second the language model too.

Shape letters: B conversations, H x W pixels, T tokens, N cells of an image, D width of the language
model.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from webssl_jax import colours
from webssl_jax.data.dialogues import DialogueView
from webssl_jax.data.views import Preprocess, with_margin
from webssl_jax.language import answers
from webssl_jax.language import decoder as decoders
from webssl_jax.language import load as language_files
from webssl_jax.language import sizes as decoder_sizes
from webssl_jax.language.answers import NETWORKS
from webssl_jax.language.dialogue import Dialogue
from webssl_jax.language.sizes import DecoderConfig
from webssl_jax.methods.base import LossOutput, Params, Schedule, Variables
from webssl_jax.methods.vitals import Alarm, Limit, Sign, Vitals
from webssl_jax.models import clip_sizes, pixels, sizes
from webssl_jax.models import connector as connectors
from webssl_jax.models.connector import ConnectorConfig
from webssl_jax.models.sizes import ViTConfig
from webssl_jax.models.vit import ViT
from webssl_jax.optim.tables import Tables
from webssl_jax.weights.load import Loaded

# name of an encoder up to its size -> what makes it
_FAMILIES: dict[str, Callable[..., ViTConfig]] = {
    "web_dino_": sizes.web_dino,
    "web_mae_": sizes.web_mae,
    "clip_": clip_sizes.vision,
    "": clip_sizes.vision,  # SigLIP's have names of their own
}


@dataclasses.dataclass(frozen=True)
class VQA:
    """The method. ``encoder``, ``connector`` and ``language`` describe the three networks;
    hashable, so it can be static under jit.

    dialogue: how conversations become tokens. trained: which networks learn, ``connector`` and
    ``language`` or one of them. image_size: pixels a side. length: tokens of a conversation, image
    included. block: tokens a text whose logits exist at a time, 0 for all.

    Raises:
      ValueError: when a field is out of range or two do not fit; one line.
    """

    encoder: ViTConfig
    connector: ConnectorConfig
    language: DecoderConfig
    dialogue: Dialogue
    trained: tuple[str, ...] = ("connector",)
    image_size: int = 224
    length: int = 2048
    block: int = 256
    mean: tuple[float, ...] = colours.IMAGENET_MEAN
    std: tuple[float, ...] = colours.IMAGENET_STD

    # A token's share of the mean depends on how many answers the others have.
    couples_batch = True
    evaluated = "params"
    picture_names = ()

    @classmethod
    def from_config(cls, config: Any) -> VQA:
        """Reads ``config.model`` (``size``: ``web_dino_1b``, ``web_mae_1b``, ``clip_1b``,
        ``siglip_b16``, ...; and/or fields of :class:`ViTConfig`) and ``config.method``:
        ``language`` (``size`` and/or fields of :class:`DecoderConfig`), ``connector``,
        ``dialogue`` and the fields of this class.

        Raises:
          ValueError: for an unknown or ill-fitting field; one line.
        """
        method = {key: value for key, value in config.method.items() if key != "name"}
        model = {"image_size": method.get("image_size", cls.image_size)} | sizes.given(config.model)
        language = sizes.given(method.pop("language", None) or {})
        size = language.pop("size", None)
        shape = decoder_sizes.SIZES.get(size, {}) if size else {}
        if size and not shape:
            known = ", ".join(decoder_sizes.SIZES)
            raise ValueError(f"method.language.size: no decoder {size!r}; there are {known}")
        language_config = decoder_sizes.build({**shape, **language})
        rest = sizes.given(method.pop("connector", None) or {})
        same = {"outputs": language_config.width, "dtype": language_config.dtype}
        connector = sizes.construct(ConnectorConfig, same | rest, "method.connector")
        dialogue = sizes.construct(
            Dialogue, dict(method.pop("dialogue", None) or {}), "method.dialogue"
        )
        networks = dict(
            encoder=_encoder(model),
            connector=connector,
            language=language_config,
            dialogue=dialogue,
        )
        return sizes.construct(cls, method | networks, "method")

    def __post_init__(self) -> None:
        colours.check(self.mean, self.std)
        self.encoder.grid_of(self.image_size, self.image_size)
        learners = ("connector", "language")
        if not self.trained or not set(self.trained) <= set(learners):
            raise ValueError(f"trained = {self.trained}: must be some of {', '.join(learners)}")
        if self.connector.outputs != self.language.width:
            raise ValueError(
                f"connector.outputs = {self.connector.outputs} must be the width of the language "
                f"model, {self.language.width}"
            )
        if -self.connector.block > self.encoder.depth:
            raise ValueError(
                f"connector.block = {self.connector.block}: the encoder has {self.encoder.depth}"
            )
        if not self.connector.cells < self.length <= self.language.context:
            raise ValueError(
                f"length = {self.length}: must be more than the {self.connector.cells} cells of an "
                f"image and at most the context of the language model, {self.language.context}"
            )
        if self.block < 0:
            raise ValueError(f"block = {self.block} must be zero or positive")

    # Variables and loss.

    def init(self, rng: jax.Array, batch_spec: Mapping[str, jax.ShapeDtypeStruct]) -> Variables:
        """Fresh parameters {"encoder", "connector", "language"}; no teacher. A run begins with
        those of an encoder and of a language model (``config.init_from``)."""
        rngs = dict(zip(NETWORKS, jax.random.split(rng, len(NETWORKS))))
        images = jnp.zeros((1, *batch_spec["image"].shape[1:]))
        params = {
            "encoder": ViT(self.encoder).init(rngs["encoder"], images)["params"],
            "connector": connectors.init(self.connector, self.encoder.width, rngs["connector"]),
            "language": decoders.init(self.language, rngs["language"]),
        }
        return Variables(params, {}, {})

    def loss(
        self,
        params: Params,
        teacher: Params,
        aux: Params,
        batch: Mapping[str, jax.Array],
        rng: jax.Array,
        schedule_values: Mapping[str, jax.Array],
    ) -> LossOutput:
        """The cross entropy of answers. batch: ``image`` (B, H, W, 3) uint8, ``tokens`` (B, T)
        int32, ``answer`` (B, T) bool and ``cut`` (B,), as ``data.dialogues.DialogueView`` makes
        them."""
        params = {
            name: tree if name in self.trained else jax.lax.stop_gradient(tree)
            for name, tree in params.items()
        }
        tokens, answer = batch["tokens"], batch["answer"]
        images = pixels.normalise(batch["image"], self.mean, self.std)
        cells = answers.image_cells(self, params, images)
        x = answers.place(params["language"], tokens, cells)
        nothing = jnp.zeros((len(tokens), 0), jnp.int32)  # no logits yet
        read = decoders.apply(
            self.language, params["language"], embeddings=x, mask=answers.real(tokens), at=nothing
        )
        # What follows the last token is not known; it is no answer.
        labels = jnp.pad(jnp.maximum(tokens[:, 1:], 0), ((0, 0), (0, 1)))
        counts = jnp.pad(answer[:, 1:], ((0, 0), (0, 1)))
        loss, hits = answers.answer_loss(
            self.language, params["language"], read.last, labels, counts, self.block
        )
        report = {
            "token_accuracy": hits,
            "answer_tokens": answer.sum() / len(tokens),
            "filled": answers.real(tokens).mean(),
            "cut_texts": (batch["cut"] > 0).mean(),
        }
        return LossOutput(loss, {"next_token": loss}, report, aux)

    def update_teacher(
        self, teacher: Params, params: Params, schedule_values: Mapping[str, jax.Array]
    ) -> Params:
        return teacher

    # What the loader, the optimiser and the reports need to know.

    def train_view(self) -> Callable[[Any, np.random.Generator], dict[str, np.ndarray]]:
        """Raises:
        WeightsError: if the tokenizer cannot be read, or has ids that the language model lacks.
        """
        self.dialogue.speaker.check_fits(self.language.vocabulary)
        return DialogueView(
            self.image_size, self.mean, self.connector.shape, self.length, self.dialogue
        )

    @property
    def preprocess(self) -> Preprocess:
        """Of evaluations of the encoder; conversations have squares (``data/dialogues.py``)."""
        return Preprocess(self.image_size, with_margin(self.image_size), self.mean, self.std)

    def batch_spec(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        side, length = self.image_size, self.length
        return {
            "image": jax.ShapeDtypeStruct((batch, side, side, 3), jnp.uint8),
            "tokens": jax.ShapeDtypeStruct((batch, length), jnp.int32),
            "answer": jax.ShapeDtypeStruct((batch, length), jnp.bool_),
            "cut": jax.ShapeDtypeStruct((batch,), jnp.int32),
        }

    def schedules(self, total_steps: int, global_batch: int) -> dict[str, Schedule]:
        return {}

    def tables(self) -> Tables:
        """What is not ``trained`` is frozen. Cambrian-1 decays nothing; where a config does,
        matrices alone are."""
        frozen = tuple((f"^{name}/", True) for name in NETWORKS if name not in self.trained)
        return Tables(decay=((r"/(bias|scale|gamma|newline)$", 0.0),), frozen=frozen)

    def open_weights(self, path: str) -> Loaded | None:
        """A language model as weights to begin with; None for what is none."""
        return language_files.open_(path)

    def vitals(self, global_batch: int) -> Vitals:
        """How well the next token of an answer is known, and what of the texts is lost."""
        signs = (
            Sign("train/next_token", "loss of answers' tokens", math.log(self.language.vocabulary)),
            Sign("train/token_accuracy", "answers' tokens that were the likeliest", 1.0),
            Sign("train/filled", "tokens that are no padding", 1.0),
            Sign("train/cut_texts", "conversations that were too long", 1.0),
        )
        alarms = (
            Alarm(
                "the language model does not speak",
                (Limit("train/next_token", above=0.8),),
                "answers are hardly likelier than random tokens: the language model has diverged, "
                "began with no weights, or has another tokenizer's ids",
                "config.init_from (does the log say that it took the language?), "
                "method.dialogue.tokenizer, config.optim.lr (lower)",
            ),
            Alarm(
                "many conversations are cut",
                (Limit("train/cut_texts", above=0.1),),
                "their last answers, or all, are not learned",
                "method.length (longer)",
                waits=0.0,
            ),
        )
        return Vitals(signs, alarms)

    def pictures(
        self, variables: Variables, batch: Mapping[str, np.ndarray], rng: jax.Array
    ) -> dict[str, np.ndarray]:
        return {}

    def train_flops(self) -> float:
        """The encoder forward; three times the forward products of the connector and, where it is
        trained, of the language model; twice those of a frozen one, through which the connector's
        gradient goes. Logits are counted of ``block`` tokens a text, a stand-in for those of
        answers, which the data tell; padding as if it were read."""
        e = self.encoder
        h, w = e.grid_of(self.image_size, self.image_size)
        seen = e.encode_flops(h * w)
        backward = 2.0 if "language" in self.trained else 1.0
        read = self.language.flops(self.length, predicted=self.block or self.length)
        return seen + 3.0 * self.connector.flops(e.width) + (1.0 + backward) * read


def _encoder(fields: dict[str, Any]) -> ViTConfig:
    """Of ``size`` and fields."""
    size = fields.pop("size", None)
    if size is None:
        return sizes.build(fields)
    prefix = next(prefix for prefix in _FAMILIES if size.startswith(prefix))
    return _FAMILIES[prefix](size.removeprefix(prefix), **fields)
