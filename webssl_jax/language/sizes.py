"""Configurations of decoders, and the published sizes by name.

One class covers Llama 2 and 3, SmolLM2, TinyLlama, Qwen2.5, Qwen3 (dense) and Mistral: they differ
in sizes, in rotary positions, in biases of q, k, v (Qwen2.5), in norms of q and k (Qwen3), in the
output head (tied or own) and in the window of attention (the first Mistral).
"""

from __future__ import annotations

import dataclasses
from typing import Any

from webssl_jax.models.sizes import BlockConfig, construct

_NOT_OURS = ("layer_scale", "drop_path", "drop_path_group")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3.1's rotary frequencies for texts longer than the model was first trained on.

    Wavelengths (tokens a turn) above ``original_context / low`` are ``factor`` times as long, those
    below ``original_context / high`` stay, between them it goes smoothly from one to the other.

    Raises:
      ValueError: when a field is out of range; one line.
    """

    factor: float
    low: float = 1.0
    high: float = 4.0
    original_context: int = 8192

    def __post_init__(self) -> None:
        if self.factor < 1 or self.original_context < 1 or not 0 < self.low < self.high:
            raise ValueError(
                f"rope_scaling: factor = {self.factor} and original_context = "
                f"{self.original_context} must be at least 1, and 0 < low = {self.low} < high = "
                f"{self.high}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig(BlockConfig):
    """One decoder. The fields of :class:`BlockConfig` that have no meaning here keep their default.

    vocabulary: number of token ids, which begin at 0.
    context: most tokens of a text, prompt and answer together.
    kv_heads: heads of keys and values; each serves ``heads / kv_heads`` heads of queries.
    head_size: channels of one head where that is not ``width / heads``.
    rope_theta, rope_scaling: of the rotary positions.
    qk_norm: whether q and k of each head go through an RMSNorm (Qwen3).
    window: a token attends to that many tokens, itself included; None for all before it.
    tied_head: whether the output head is the table of token embeddings.
    attention: ``xla``, or ``pallas`` for the kernels of ``splash.py`` where they apply, in training
      on TPUs; the result is the same.

    Raises:
      ValueError: when a field is out of range or two do not fit; one line.
    """

    vocabulary: int
    context: int
    kv_heads: int
    head_size: int | None = None
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    qk_norm: bool = False
    window: int | None = None
    tied_head: bool = False
    mlp: str = "swiglu"
    qkv_bias: bool = False
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_choices(mlp=("swiglu",))
        self._check_positive("vocabulary", "context", "kv_heads", "head_size", "window")
        for field in dataclasses.fields(BlockConfig):
            value = getattr(self, field.name)
            if field.name in _NOT_OURS and value != field.default:
                raise ValueError(f"{field.name} = {value!r}: a decoder has none; leave it out")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads = {self.heads} do not divide into kv_heads = {self.kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"heads of {self.head_dim} channels: rotary positions take pairs")
        if self.rope_theta <= 0:
            raise ValueError(f"rope_theta = {self.rope_theta} must be positive")

    def _check_kernels(self) -> None:
        if self.head_dim % 64:
            raise ValueError(
                "attention = 'pallas' takes heads of 64 channels or a multiple, not "
                f"{self.head_dim}; use 'xla'"
            )

    @property
    def causal(self) -> bool:
        return True

    @property
    def head_dim(self) -> int:
        return self.head_size or self.width // self.heads

    def flops(self, tokens: int, predicted: int | None = None) -> float:
        """Floating-point operations of the matrix products of one text of ``tokens``, forward, with
        the logits of ``predicted`` of them (None for all); two a multiply-add. A token is compared
        with itself and those before it alone: of all pairs that is half."""
        predicted = tokens if predicted is None else predicted
        channels = (2 * self.heads + 2 * self.kv_heads) * self.head_dim
        pairs = (tokens + 1) * self.heads * self.head_dim  # T (T + 1) / 2, in two products
        block = self.width * (channels + 3 * self.hidden) + pairs
        return 2.0 * (tokens * self.depth * block + predicted * self.width * self.vocabulary)


_LLAMA3 = dict(vocabulary=128_256, rope_theta=500_000.0, context=131_072, kv_heads=8)
_SMOLLM2 = dict(vocabulary=49_152, rope_theta=100_000.0, context=8192, tied_head=True)
_QWEN = dict(rope_theta=1_000_000.0, norm_eps=1e-6)
_QWEN25 = _QWEN | dict(qkv_bias=True, context=32_768)
_QWEN3 = _QWEN | dict(qk_norm=True, context=40_960, vocabulary=151_936, kv_heads=8, head_size=128)
_SCALED = RopeScaling(factor=8.0)
_SCALED_SMALL = RopeScaling(factor=32.0)


def _shape(width: int, hidden: int, depth: int, heads: int, **rest: Any) -> dict[str, Any]:
    return dict(width=width, mlp_hidden=hidden, depth=depth, heads=heads) | rest


SIZES: dict[str, dict[str, Any]] = {
    "llama-3-8b": _LLAMA3 | _shape(4096, 14_336, 32, 32, context=8192),
    "llama-3.1-8b": _LLAMA3 | _shape(4096, 14_336, 32, 32, rope_scaling=_SCALED),
    "llama-3.1-70b": _LLAMA3 | _shape(8192, 28_672, 80, 64, rope_scaling=_SCALED),
    "llama-3.2-1b": _LLAMA3
    | _shape(2048, 8192, 16, 32, rope_scaling=_SCALED_SMALL, tied_head=True),
    "llama-3.2-3b": _LLAMA3
    | _shape(3072, 8192, 28, 24, rope_scaling=_SCALED_SMALL, tied_head=True),
    "smollm2-135m": _SMOLLM2 | _shape(576, 1536, 30, 9, kv_heads=3),
    "smollm2-360m": _SMOLLM2 | _shape(960, 2560, 32, 15, kv_heads=5),
    "smollm2-1.7b": _SMOLLM2 | _shape(2048, 8192, 24, 32, kv_heads=32, rope_theta=130_000.0),
    "tinyllama-1.1b": _shape(2048, 5632, 22, 32, kv_heads=4, vocabulary=32_000, context=2048),
    "qwen2.5-0.5b": _QWEN25
    | _shape(896, 4864, 24, 14, kv_heads=2, vocabulary=151_936, tied_head=True),
    "qwen2.5-7b": _QWEN25 | _shape(3584, 18_944, 28, 28, kv_heads=4, vocabulary=152_064),
    "qwen3-0.6b": _QWEN3 | _shape(1024, 3072, 28, 16, tied_head=True),
    "qwen3-8b": _QWEN3 | _shape(4096, 12_288, 36, 32),
    "mistral-7b": _shape(
        4096, 14_336, 32, 32, kv_heads=8, vocabulary=32_768, context=32_768, rope_theta=1_000_000.0
    ),
}


def decoder(size: str, **overrides: Any) -> DecoderConfig:
    """The decoder of that name in :data:`SIZES`; ``overrides`` replace any field.

    Raises:
      ValueError: for an unknown name or field, or fields that do not fit.
    """
    if size not in SIZES:
        raise ValueError(f"no decoder {size!r}; there are {', '.join(SIZES)}")
    return build(SIZES[size] | overrides)


def build(fields: dict[str, Any]) -> DecoderConfig:
    """``DecoderConfig(**fields)``, with errors in one line for people.

    Raises:
      ValueError: for an unknown or missing field, a value of another type than the field's, or
        fields that do not fit.
    """
    return construct(DecoderConfig, fields, "a decoder")
