"""Decoders in files of ``transformers``: Llama, Mistral, Qwen2 and Qwen3 (``*ForCausalLM``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from webssl_jax.language.sizes import DecoderConfig, RopeScaling, build
from webssl_jax.weights.stored import WeightsError, shown
from webssl_jax.weights.tables import Row, Table, linear

MODEL_TYPES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def table(c: DecoderConfig) -> Table:
    """Our parameters and their tensors."""
    ours, theirs = "blocks", "model.layers.{i}"
    rows = [
        Row("token_embed", "model.embed_tokens.weight"),
        Row(f"{ours}/norm1/scale", f"{theirs}.input_layernorm.weight"),
        Row(f"{ours}/norm2/scale", f"{theirs}.post_attention_layernorm.weight"),
        *linear(f"{ours}/attn/out", f"{theirs}.self_attn.o_proj", bias=False),
        Row("norm/scale", "model.norm.weight"),
    ]
    for name in "qkv":
        rows += linear(f"{ours}/attn/{name}", f"{theirs}.self_attn.{name}_proj", c.qkv_bias)
    for name in "qk" if c.qk_norm else "":
        norm = f"{ours}/attn/{name}_norm/scale"
        rows.append(Row(norm, f"{theirs}.self_attn.{name}_norm.weight"))
    for name, other in (("w1", "gate"), ("w2", "up"), ("w3", "down")):
        rows += linear(f"{ours}/mlp/{name}", f"{theirs}.mlp.{other}_proj", bias=False)
    if not c.tied_head:
        rows += linear("lm_head", "lm_head", bias=False)
    return Table(
        model_type(c),
        tuple(rows),
        # a file of the model without its head has no prefix
        aliases=((r"^(embed_tokens|layers|norm)\.", r"model.\1."),),
        # some files keep a tied head, or the rotary frequencies, as tensors
        ignore=(r"rotary_emb\.inv_freq$", *((r"^lm_head\.",) if c.tied_head else ())),
    )


def model_type(c: DecoderConfig) -> str:
    """The architecture of transformers that is this decoder.

    Raises:
      WeightsError: if there is none.
    """
    special = [("qwen3", c.qk_norm), ("qwen2", c.qkv_bias), ("mistral", c.window is not None)]
    found = [name for name, is_so in special if is_so]
    if len(found) > 1:
        raise WeightsError(
            "no model of transformers has two of: norms of q and k, biases of q, k and v, a window"
        )
    return found[0] if found else "llama"


def read_config(values: Mapping[str, Any], where: object) -> DecoderConfig:
    """The decoder that a ``config.json`` describes. where: the file, for errors.

    Raises:
      WeightsError: for another kind of model, or a variant that our decoder does not compute.
    """
    kind = values.get("model_type")
    if kind not in MODEL_TYPES:
        raise WeightsError(
            f"{where}: model_type {shown(kind)!r} is no decoder that can be read; those of "
            f"{', '.join(MODEL_TYPES)} can"
        )
    _refuse_variants(values, where)
    window = values.get("sliding_window") if kind == "mistral" else None
    try:
        fields = dict(
            vocabulary=values["vocab_size"],
            width=values["hidden_size"],
            mlp_hidden=values["intermediate_size"],
            depth=values["num_hidden_layers"],
            heads=values["num_attention_heads"],
            kv_heads=values.get("num_key_value_heads") or values["num_attention_heads"],
            head_size=values.get("head_dim"),
            context=values["max_position_embeddings"],
            norm_eps=values["rms_norm_eps"],
            tied_head=values.get("tie_word_embeddings", False),
            qkv_bias=kind == "qwen2",
            qk_norm=kind == "qwen3",
            window=window,
            **_rope(values, where),
        )
        return build(fields)
    except KeyError as error:
        raise WeightsError(f"{where}: has no {error}") from None
    except ValueError as error:
        raise WeightsError(f"{where}: {error}") from None


def _refuse_variants(values: Mapping[str, Any], where: object) -> None:
    wanted: dict[str, Any] = {
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "use_sliding_window": False,
    }
    for key, value in wanted.items():
        if values.get(key, value) != value:
            raise WeightsError(
                f"{where}: {key} = {shown(values[key])} is not what our decoder computes ({value})"
            )


def _rope(values: Mapping[str, Any], where: object) -> dict[str, Any]:
    """transformers 5 has all of it in ``rope_parameters``, 4 in ``rope_theta`` and
    ``rope_scaling``."""
    scaling = values.get("rope_parameters") or values.get("rope_scaling") or {}
    theta = scaling.get("rope_theta", values.get("rope_theta", 10_000.0))
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return dict(rope_theta=theta)
    if kind != "llama3":
        raise WeightsError(
            f"{where}: rotary positions of the type {shown(kind)!r} cannot be read; 'default' and "
            "'llama3' can"
        )
    return dict(
        rope_theta=theta,
        rope_scaling=RopeScaling(
            factor=scaling["factor"],
            low=scaling["low_freq_factor"],
            high=scaling["high_freq_factor"],
            original_context=scaling["original_max_position_embeddings"],
        ),
    )


def write_config(c: DecoderConfig, dtype: str) -> dict[str, Any]:
    """``config.json``, as transformers 4 and 5 read it."""
    kind, scaling = model_type(c), c.rope_scaling
    values = {
        "architectures": [MODEL_TYPES[kind]],
        "model_type": kind,
        "dtype": dtype,
        "vocab_size": c.vocabulary,
        "hidden_size": c.width,
        "intermediate_size": c.hidden,
        "num_hidden_layers": c.depth,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": c.context,
        "rms_norm_eps": c.norm_eps,
        "tie_word_embeddings": c.tied_head,
        "rope_theta": c.rope_theta,
        "rope_scaling": None,
    }
    if scaling:
        values["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low,
            "high_freq_factor": scaling.high,
            "original_max_position_embeddings": scaling.original_context,
        }
    if kind == "mistral":
        values["sliding_window"] = c.window
    if kind in ("qwen2", "qwen3"):
        values["use_sliding_window"] = False
    return values
