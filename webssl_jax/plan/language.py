"""What a language model needs and how fast it can be, at best, on a TPU slice that is not here.

    python -m webssl_jax.plan --language llama-3.1-8b --slice v5e-64 [--texts 64] [--tokens 2048]
    python -m webssl_jax.plan --language llama-3.1-70b --slice v5e-64 --reads

Compiles one training step (next tokens, AdamW, parameters and moments in float32, computed in
bfloat16, every block again in the backward pass), or with ``--reads`` what reads captions for the
alignment row: bfloat16, the mean of all hidden states of each text. The state is cut over all
devices.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from webssl_jax import environment
from webssl_jax import params as params_lib
from webssl_jax.config import UserError
from webssl_jax.language import decoder, sizes
from webssl_jax.language.model import pooled_program
from webssl_jax.language.sizes import DecoderConfig
from webssl_jax.optim.optimizer import Optimizer
from webssl_jax.optim.tables import Tables
from webssl_jax.plan import bundles, hlo
from webssl_jax.plan.training import (
    IGNORED,
    OutOfMemory,
    compile_or_refuse,
    limit,
    lines,
    nothing_runs,
    speed,
)
from webssl_jax.sharding import compiler_options, rules, slices
from webssl_jax.sharding import mesh as meshes
from webssl_jax.telemetry.progress import format_seconds

_GIB = 2**30
_ADAMW = Optimizer(0.9, 0.95, 1e-8, "global", 1.0, "float32", Tables())
_RATES = {"learning_rate": 1e-5, "weight_decay": 0.1}  # any will do: nothing runs


def plan_language(
    size: str,
    slice_: slices.Slice,
    count: int = 1,
    texts: int = 64,
    tokens: int = 2048,
    reads: bool = False,
    **overrides: Any,
) -> dict[str, Any]:
    """Compiles a training step, or what ``reads``, of ``texts`` texts of ``tokens`` tokens.

    size, overrides: as of ``language.sizes.decoder``.

    Returns:
      The figures, under the keys of ``--json``; ``tokens_per_s`` is None where it does not fit.

    Raises:
      UserError: for an unknown size, or numbers that cannot be.
    """
    try:
        config = sizes.decoder(size, dtype="bfloat16", remat="full", **overrides)
    except ValueError as error:
        raise UserError(f"--language {size}: {error}") from None
    mesh = meshes.create(ConfigDict({"replica": 1, "fsdp": -1, "tensor": 1}), slice_.devices(count))
    if texts < 1 or texts % mesh.size:
        raise UserError(f"--texts {texts}: does not divide over {mesh.size} devices")
    if not 2 <= tokens <= config.context:
        raise UserError(f"--tokens {tokens}: must be 2 to {config.context}")
    flops = (config.flops(tokens, predicted=0) if reads else 3 * config.flops(tokens)) * texts
    result: dict[str, Any] = {
        "language": size,
        "does": "reads" if reads else "trains",
        "slice": slice_.name,
        "chips": slice_.chips * count,
        "texts": texts,
        "tokens": tokens,
        "parameters": params_lib.count(decoder.template(config)),
        "hbm_gib": slice_.chip.hbm_gib,
        "model_flops": flops,
    }
    began = time.process_time()
    with nothing_runs():
        lowered = (_reading if reads else _training)(config, mesh, texts, tokens)
    known = {"model_flops": flops, "global_batch": texts, "chips": result["chips"]}
    try:
        found = measure(lowered, slice_, mesh, known)
    except OutOfMemory as refusal:
        gone = dict.fromkeys(("tokens_per_s", "mfu_with_exposed_ici", "mfu_attainable"))
        fits = {"fits": False, "peak_hbm_gib": refusal.needs, "error": str(refusal)}
        return result | gone | fits | {"compile_cpu_s": time.process_time() - began}
    kept = "peak_hbm_gib mfu_with_exposed_ici attainable_s mfu_attainable limits worst".split()
    return result | {
        "fits": True,
        "error": None,
        "tokens_per_s": found["images_per_s"] * tokens,
        **{key: found[key] for key in kept},
        "compile_cpu_s": time.process_time() - began,
        "ignored": list(IGNORED),
        "versions": {name: environment.package_versions()[name] for name in ("jax", "libtpu")},
    }


def measure(
    lowered: jax.stages.Lowered, slice_: slices.Slice, mesh: Mesh, known: Mapping[str, Any]
) -> dict[str, Any]:
    """What ``training.speed`` and ``training.limit`` say of a step, once compiled, and
    ``peak_hbm_gib``. known: its ``model_flops``, ``global_batch`` and ``chips``.

    Raises:
      OutOfMemory: if it does not fit.
    """
    compiled = compile_or_refuse(lowered)
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert text is not None and memory is not None  # a compiler for TPUs gives both
    kernels = bundles.cycles(hlo.kernels_of(text), slice_)
    modelled = speed(hlo.cost(text, kernels), slice_, mesh, known, 1)
    modelled["peak_hbm_gib"] = memory.peak_memory_in_bytes / _GIB
    return modelled | limit(text, slice_, kernels, modelled)


def _abstract(tree: Any, mesh: Mesh, dtype: Any = None) -> Any:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(
            leaf.shape, dtype or leaf.dtype, sharding=sharding
        ),
        tree,
        rules.shardings(tree, mesh),
    )


def _batch(mesh: Mesh, texts: int, tokens: int, dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((texts, tokens), dtype, sharding=meshes.batch_sharding(mesh))


def _reading(config: DecoderConfig, mesh: Mesh, texts: int, tokens: int) -> jax.stages.Lowered:
    params = _abstract(decoder.template(config), mesh, jnp.bfloat16)
    inputs = [_batch(mesh, texts, tokens, dtype) for dtype in (jnp.int32, bool)]
    return pooled_program(mesh).lower(config, params, *inputs)


def _training(config: DecoderConfig, mesh: Mesh, texts: int, tokens: int) -> jax.stages.Lowered:
    loss = functools.partial(_next_token_loss, config)
    return lower_training(loss, decoder.template(config), mesh, (texts, tokens))


def lower_training(
    loss: Callable[[Any, jax.Array], jax.Array],
    params: Any,
    mesh: Mesh,
    shape: tuple[int, int],
    options: Mapping[str, Any] | None = None,
) -> jax.stages.Lowered:
    """A whole step on abstract arrays: the gradient of ``loss(params, ids)``, clipped, and AdamW;
    the state is cut by ``rules``. params: a template. shape: of ids, (texts, tokens). options: of
    the compiler, those of a run on such chips by default."""
    params = _abstract(params, mesh)
    moments = _abstract(jax.eval_shape(_ADAMW.init, params), mesh)

    def step(params: Any, moments: Any, ids: jax.Array) -> tuple[Any, Any, jax.Array]:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # for models/layers.on_batch
            value, grads = jax.value_and_grad(loss)(params, ids)
            grads, _ = _ADAMW.clip_gradients(grads)
            values = {name: jnp.float32(value) for name, value in _RATES.items()}
            return *_ADAMW.update(grads, moments, params, values), value

    laid = jax.tree.map(lambda x: x.sharding, (params, moments))
    whole = meshes.replicated(mesh)
    jitted = jax.jit(
        step,
        donate_argnums=(0, 1),
        out_shardings=(*laid, whole),
        compiler_options=compiler_options.of(mesh) if options is None else dict(options),
    )
    return jitted.lower(params, moments, _batch(mesh, *shape, jnp.int32))


def _next_token_loss(config: DecoderConfig, params: Any, ids: jax.Array) -> jax.Array:
    logits = decoder.apply(config, params, ids).logits[:, :-1]
    return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()


def table(r: Mapping[str, Any]) -> str:
    """The figures for people."""
    head = f"{r['language']} ({r['parameters']:,} parameters) on {r['slice']}: {r['chips']} chips"
    memory = f"{r['peak_hbm_gib']:.2f} of {r['hbm_gib']:.2f} GiB a device"
    rows = [(r["does"], f"{r['texts']:,} texts of {r['tokens']:,} tokens a call")]
    if not r["fits"]:
        short = r["error"].split("\n")[0]
        return lines(head, [("fits", f"NO: needs {memory}"), *rows, ("", short)])
    rows = [("fits", f"yes, {memory}"), *rows]
    rows += [
        ("modelled MFU", f"{100 * r['mfu_with_exposed_ici']:.1f}% with exposed ICI"),
        ("attainable MFU", f"{100 * r['mfu_attainable']:.1f}%"),
        ("at best", f"{r['tokens_per_s']:,.0f} tokens/s"),
        ("compiled in", f"{format_seconds(r['compile_cpu_s'])} of CPU"),
    ]
    rows += [("left out" if i == 0 else "", text) for i, text in enumerate(r["ignored"])]
    return lines(head, rows)
