"""What plan models beside what others measured: MaxText's published MFU of dense decoders.

    python tools/calibrate_plan.py --row ROW [ROW ...]   compile these, e.g. 16b@v5e-256
    python tools/calibrate_plan.py --list                name all rows, and which are missing
    python tools/calibrate_plan.py                       print the tables of docs/plan.md again

Each row is a training step of the network that MaxText measured, written anew from its public
configuration and compiled for the same slice: same shapes, batch, sharding, recomputation and flags
of the compiler. Schedule and MFU are then read by the functions of ``webssl_jax.plan``. A row takes
one to eight minutes of CPU and stands in docs/plan_calibration.json as soon as it is compiled.

Shape letters: B texts, T tokens, D width, V vocabulary, h heads, k heads of keys and values, d
channels a head.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
import time
from typing import Any

from webssl_jax import cli


def _parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(description=__doc__)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--row", nargs="+", default=[], metavar="MODEL@SLICE")
    what.add_argument("--list", action="store_true")
    return parser


cli.help_early(_parser, __name__)

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import PartitionSpec
from ml_collections import ConfigDict

from webssl_jax import environment
from webssl_jax import params as params_lib
from webssl_jax.config import UserError
from webssl_jax.language import decoder
from webssl_jax.language.sizes import DecoderConfig
from webssl_jax.models.layers import Linear, batch_shards, checkpoint_name, swiglu
from webssl_jax.plan import language
from webssl_jax.plan.training import OutOfMemory, nothing_runs
from webssl_jax.sharding import mesh as meshes
from webssl_jax.sharding import slices
from webssl_jax.telemetry.throughput import PEAK_FLOPS
from webssl_jax.tools import plan_table

FIGURES = plan_table.CALIBRATION
KEPT = (
    "peak_hbm_gib executed_over_model_flops compute_s exposed_ici_s wire_gb exposed_gb "
    "mfu_modelled mfu_with_exposed_ici attainable_s mfu_attainable unpriced_kernels "
    "unknown_loops"
).split()

# ----------------------------------------------------------------------- what MaxText has measured

# Flags of MaxText's scripts that act within a slice; those for several slices are left out.
_GATHERS = {
    "xla_tpu_enable_async_collective_fusion": True,
    "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
    "xla_tpu_overlap_compute_collective_tc": True,
    "xla_enable_async_all_gather": True,
}
_FUSED = _GATHERS | {"xla_tpu_enable_async_collective_fusion_fuse_all_gather": True}
_V5P = _GATHERS | {
    "xla_tpu_megacore_fusion_allow_ags": False,
    "xla_enable_async_collective_permute": True,
    "xla_tpu_enable_ag_backward_pipelining": True,
}
_DOTS = "minimal"  # all products without a batch axis are kept
_KEPT_70B = ("query", "key", "value", "out", "wo")  # save_dot_except_mlpwi


@dataclasses.dataclass(frozen=True)
class Row:
    """One measurement. mfu: as published, a share. network: shapes. texts: a chip. pairs: the share
    of all T x T pairs of tokens that its MFU counts. table: whether the look-up table counts among
    the parameters (where it is the output head, too, it must). keeps: names of :class:`Block` that
    the backward pass does not compute again, or ``minimal``. offloads: those that lie in the host's
    memory until then; these copies take no time here. block: of queries and of keys, in attention.
    fused: whether its backward pass is one kernel.

    2023: attention and MLP side by side, ReLU, no rotation. norms: of q, k and v, which are then
    rotated, too.
    """

    mfu: float
    network: DecoderConfig
    texts: int
    options: dict[str, Any]
    source: str
    tokens: int = 2048
    pairs: float = 1.0
    table: bool = True
    tensor: int = 1
    keeps: tuple[str, ...] | str = ()
    offloads: tuple[str, ...] = ()
    block: int = 512
    fused: bool = False
    parallel: bool = True
    norms: bool = False

    def policy(self) -> Any:
        """What is kept for the backward pass."""
        policies = jax.checkpoint_policies
        if self.keeps == _DOTS:
            return policies.dots_with_no_batch_dims_saveable
        if not self.offloads:
            return policies.save_only_these_names(*self.keeps)
        return policies.save_and_offload_only_these_names(
            names_which_can_be_saved=list(self.keeps),
            names_which_can_be_offloaded=list(self.offloads),
            offload_src="device",
            offload_dst="pinned_host",
        )

    def flops(self, texts: int, parameters: int) -> float:
        """Of a step, counted as MaxText does."""
        c, tokens = self.network, texts * self.tokens
        counted = parameters - (0 if self.table else c.vocabulary * c.width)
        attention = 12 * c.depth * c.heads * c.head_dim * self.tokens
        return tokens * (6.0 * counted + self.pairs * attention)


def _network(**fields: Any) -> DecoderConfig:
    return DecoderConfig(dtype="bfloat16", attention="pallas", **fields)


def _of_2023(width: int, hidden: int, heads: int, depth: int) -> DecoderConfig:
    """MaxText's own network until February 2024."""
    shape = dict(width=width, mlp_hidden=hidden, heads=heads, kv_heads=heads, depth=depth)
    return _network(head_size=256, vocabulary=32_768, context=2048, tied_head=True, **shape)


_16B = _of_2023(5120, 32_768, 32, 32)
_32B = _of_2023(10_240, 32_768, 32, 32)
_64B = _of_2023(10_240, 32_768, 32, 64)
_128B = _of_2023(10_240, 65_536, 64, 64)
_LLAMA_2_70B = _network(
    width=8192, mlp_hidden=28_672, heads=64, kv_heads=8, depth=80, vocabulary=32_000, context=4096
)
_LLAMA_3 = functools.partial(
    _network, kv_heads=8, vocabulary=128_256, context=8192, rope_theta=500_000.0
)
_LLAMA_3_8B = _LLAMA_3(width=4096, mlp_hidden=14_336, heads=32, depth=32)
_LLAMA_3_70B = _LLAMA_3(width=8192, mlp_hidden=28_672, heads=64, depth=80)
_OCTOBER = "maxtext 9bc243c95: v5e_high_performance.md, MaxText/configs/largest_job"
_DECEMBER = "maxtext 76bd53b0f: MaxText/configs/v5p"
_V5E = functools.partial(Row, options=_FUSED, source=_OCTOBER)
_V6E = functools.partial(
    Row,
    options=_FUSED | {"xla_tpu_scoped_vmem_limit_kib": 98_304},
    source="maxtext e591f30cb: docs/reference/models/tiering.md, "
    "benchmarks/maxtext_trillium_model_configs",
    tokens=8192,
    table=False,
    parallel=False,
    block=2048,
    fused=True,
)
_V5P_2023 = functools.partial(
    Row, options=_V5P, source=_DECEMBER, pairs=0.5, keeps=_DOTS, norms=True
)
ROWS = {
    "16b@v5e-256": _V5E(0.6110, _16B, 6),
    "32b@v5e-256": _V5E(0.6686, _32B, 4),
    "64b@v5e-256": _V5E(0.5990, _64B, 2),
    "128b@v5e-256": _V5E(0.5606, _128B, 1, tensor=16),
    "32b@v5p-128": _V5P_2023(0.7147, _32B, 8, tensor=4),
    "64b@v5p-128": _V5P_2023(0.7031, _64B, 4, tensor=4),
    "128b@v5p-256": _V5P_2023(0.6868, _128B, 2, tensor=8),
    "128b@v5p-512": _V5P_2023(0.6883, _128B, 2, tensor=8),
    "llama-2-70b@v5p-1024": Row(
        0.654,
        _LLAMA_2_70B,
        4,
        _FUSED,
        "maxtext 92e59fdf5: docs/reference/models/tiering.md, benchmarks/maxtext_v5p_model_configs",
        tokens=4096,
        pairs=0.5,
        table=False,
        keeps=_KEPT_70B,
        parallel=False,
    ),
    "llama-3.1-8b@v6e-256": _V6E(
        0.4546, _LLAMA_3_8B, 4, offloads=("input", "query", "key", "value", "out")
    ),
    "llama-3.1-70b@v6e-256": _V6E(
        0.5033, _LLAMA_3_70B, 5, offloads=("input", "query", "key", "value")
    ),
}
# Not compiled, and why.
LEFT_OUT = {
    "llama-2-70b@v6e-256": (0.438, "not compiled: cuts its MLP in another way (fsdp_transpose)"),
    "llama-3.1-405b@v6e-256": (0.3855, "not compiled"),
}

# ------------------------------------------------------------------------------------- the network


def _residual(x: jax.Array) -> jax.Array:
    """(B, T, D), by the batch over ``fsdp`` and by channels over ``tensor``, as MaxText has it."""
    return jax.lax.with_sharding_constraint(x, PartitionSpec(batch_shards()[0], None, "tensor"))


def _attend(row: Row, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """(B, T, h, d), and k and v (B, T, k, d), to (B, T, h, d): each device its texts and heads."""
    names = [field.name for field in dataclasses.fields(splash.BlockSizes)]
    blocks: dict[str, Any] = {name: row.block for name in names if name.startswith("block_")}
    blocks |= dict.fromkeys(("block_q_dq", "block_kv_dq"), None if row.fused else row.block)
    sizes = splash.BlockSizes(**blocks, use_fused_bwd_kernel=row.fused)

    def own(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        length, heads = q.shape[1:3]
        mask = splash.MultiHeadMask([splash.CausalMask((length, length))] * heads)
        kernel = splash.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1)
        q, k, v = (x.swapaxes(1, 2) for x in (q * q.shape[-1] ** -0.5, k, v))
        return jax.vmap(kernel)(q, k, v).swapaxes(1, 2)

    cut = PartitionSpec(batch_shards()[0], None, "tensor")
    return jax.shard_map(own, in_specs=(cut,) * 3, out_specs=cut, check_vma=False)(q, k, v)


class Attention(nn.Module):
    """Grouped-query attention by Splash kernels."""

    row: Row

    @nn.compact
    def __call__(self, x: jax.Array, angles: jax.Array) -> jax.Array:
        """(B, T, D) -> (B, T, D)."""
        c, norms = self.row.network, self.row.norms
        rotated = norms or not self.row.parallel

        def heads(name: str, count: int) -> jax.Array:
            x_ = Linear(c, count * c.head_dim, use_bias=False, name=name[0])(x)
            x_ = rearrange(x_, "b t (h d) -> b t h d", h=count)
            if rotated and name != "value":
                x_ = decoder.rotate(x_, angles)
            if norms:
                x_ = decoder.rms_norm(c, f"{name}_norm")(x_)
            return checkpoint_name(x_, name)

        q, k, v = heads("query", c.heads), heads("key", c.kv_heads), heads("value", c.kv_heads)
        out = rearrange(_attend(self.row, q, k, v), "b t h d -> b t (h d)")
        return checkpoint_name(Linear(c, c.width, use_bias=False, name="out")(out), "out")


class Mlp(nn.Module):
    """ReLU, or SwiGLU."""

    config: DecoderConfig
    gated: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, T, D) -> (B, T, D)."""
        c = self.config
        names = ("w1", "w2") if self.gated else ("w1",)
        wide = [
            checkpoint_name(Linear(c, c.hidden, use_bias=False, name=name)(x), "wi")
            for name in names
        ]
        x = swiglu(*wide) if self.gated else jax.nn.relu(*wide)
        return checkpoint_name(Linear(c, c.width, use_bias=False, name="w3")(x), "wo")


class Block(nn.Module):
    """One block; a step of the scan."""

    row: Row

    @nn.compact
    def __call__(self, x: jax.Array, angles: jax.Array) -> tuple[jax.Array, None]:
        c, parallel = self.row.network, self.row.parallel
        before = checkpoint_name(_residual(x), "input")
        seen = _residual(decoder.rms_norm(c, "norm1")(before))
        attended = _residual(Attention(self.row, name="attn")(seen, angles))
        if not parallel:
            before = before + attended
            seen = _residual(decoder.rms_norm(c, "norm2")(before))
        out = _residual(Mlp(c, gated=not parallel, name="mlp")(seen))
        if parallel:
            out = out + attended
        return _residual(before + out), None


class Network(nn.Module):
    """Ids (B, T) to logits (B, T, V) in float32. The table is read by a product with one-hot rows,
    as in those runs."""

    row: Row

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        r, c = self.row, self.row.network
        init = nn.initializers.normal(0.02)
        table = self.param("token_embed", init, (c.vocabulary, c.width))
        x = jax.nn.one_hot(ids, c.vocabulary, dtype=c.dtype) @ table.astype(c.dtype)
        angles = jnp.arange(ids.shape[1])[None, :, None] * decoder.frequencies(c)
        stack = nn.scan(
            nn.remat(Block, policy=r.policy(), prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=c.depth,
        )
        x, _ = stack(r, name="blocks")(_residual(x), angles)
        x = decoder.rms_norm(c, "norm")(x)
        if not c.tied_head:
            return decoder.LMHead(c, name="lm_head")(x)
        head = table.astype(c.dtype)
        logits = jnp.einsum("btd,vd->btv", x, head, preferred_element_type=jnp.float32)
        return logits / c.width**0.5


def next_token_loss(network: Network, params: Any, ids: jax.Array) -> jax.Array:
    """Mean over all tokens; each row of logits stays in its shards."""
    logits = network.apply({"params": params}, ids)
    assert isinstance(logits, jax.Array)
    axes = batch_shards()[0]
    logits = jax.lax.with_sharding_constraint(logits, PartitionSpec(axes, None, "tensor"))
    right = jax.nn.one_hot(jnp.roll(ids, -1, axis=1), logits.shape[-1], dtype=logits.dtype)
    return (jax.nn.logsumexp(logits, axis=-1) - (logits * right).sum(axis=-1)).mean()


# ------------------------------------------------------------------------------------- the command


def compared(row: Row, figures: dict[str, Any]) -> dict[str, float]:
    """``factor``: measured / modelled, where ``skipped_s`` are left out of the modelled time: those
    of tiles of attention that come after all of their queries. The compiler counts them, the
    kernels skip them, and encoders have none. Taken of all that attention does: an upper figure."""
    rounds = row.tokens // row.block
    attention_s = sum(x["modelled_s"] for x in figures["limits"] if x["category"] == "attention")
    skipped_s = attention_s * (rounds - 1) / (2 * rounds)
    step_s = figures["compute_s"] + figures["exposed_ici_s"]
    modelled = figures["mfu_with_exposed_ici"] * step_s / (step_s - skipped_s)
    return {"skipped_s": skipped_s, "factor": row.mfu / modelled}


def compile_row(name: str) -> dict[str, Any]:
    """The figures of one row: those of plan, its published MFU and their quotient.

    Raises:
      UserError: for a row that is not in :data:`ROWS`.
    """
    if name not in ROWS:
        raise UserError(f"--row {name}: must be one of {', '.join(ROWS)}")
    row, slice_ = ROWS[name], slices.find(name.partition("@")[2])
    axes = ConfigDict({"replica": 1, "fsdp": -1, "tensor": row.tensor})
    mesh = meshes.create(axes, slice_.devices())
    network, texts = Network(row), row.texts * slice_.chips
    ids = jax.ShapeDtypeStruct((meshes.batch_shards(mesh), row.tokens), jnp.int32)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        template = jax.eval_shape(network.init, jax.random.key(0), ids)["params"]
    parameters = params_lib.count(template)
    flops = row.flops(texts, parameters)
    known = {"model_flops": flops, "global_batch": texts, "chips": slice_.chips}
    began = time.process_time()
    with nothing_runs():
        loss = functools.partial(next_token_loss, network)
        shape = (texts, row.tokens)
        lowered = language.lower_training(loss, template, mesh, shape, row.options)
    out = {
        "command": f"python tools/calibrate_plan.py --row {name}",
        "revision": plan_table.revision(),
        "date": time.strftime("%Y-%m-%d"),
        "source": row.source,
        "mfu_measured": row.mfu,
        "step_s_measured": flops / (row.mfu * PEAK_FLOPS[slice_.chip.device_kind] * slice_.chips),
        "parameters": parameters,
        "mesh": dict(mesh.shape),
        "texts": texts,
        "tokens": row.tokens,
        "versions": {name: environment.package_versions()[name] for name in ("jax", "libtpu")},
    }
    try:
        found = language.measure(lowered, slice_, mesh, known)
    except OutOfMemory as refusal:
        out |= {"fits": False, "peak_hbm_gib": refusal.needs, "error": str(refusal).split("\n")[0]}
    else:
        out |= {"fits": True, "error": None} | {key: found[key] for key in KEPT}
        out["limits"] = found["limits"]
        out |= compared(row, out)
    return out | {"compile_cpu_s": time.process_time() - began}


def table(figures: dict[str, Any]) -> str:
    """The table of docs/plan.md."""
    lines = [
        "| Network | Slice | a chip | cut | modelled | attainable | measured | factor |",
        "| --- | --- | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for name, row in ROWS.items():
        network, _, place = name.partition("@")
        if (r := figures.get(name)) is None:
            lines.append(f"| {network} | {place} | | | not compiled | | {100 * row.mfu:.1f}% | |")
        else:
            cut = f"fsdp {r['mesh']['fsdp']}"
            cut += f", tensor {row.tensor}" if row.tensor > 1 else ""
            of = f"{row.texts} x {row.tokens:,}"
            cells = [network, place, of, cut, "does not fit", "", f"{100 * row.mfu:.1f}%", ""]
            if r["fits"]:
                cells[4] = f"{100 * r['mfu_with_exposed_ici']:.1f}%"
                cells[5] = f"{100 * r['mfu_attainable']:.1f}%"
                cells[7] = f"{r['factor']:.3f}"
            lines.append("| " + " | ".join(cells) + " |")
    for name, (mfu, why) in LEFT_OUT.items():
        network, _, place = name.partition("@")
        lines.append(f"| {network} | {place} | | | {why} | | {100 * mfu:.1f}% | |")
    return "\n".join(lines)


def summary(figures: dict[str, Any]) -> str:
    """Of the rows that fit, by generation: the table below that one."""
    lines = [
        "| Rows | | mean factor | least, most | 9 of 10 further programs |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for place in ("v5e", "v5p", "v6e", ""):
        found = [
            r["factor"]
            for name, r in figures.items()
            if r["fits"] and name.partition("@")[2].startswith(place)
        ]
        if len(found) > 1:  # one has no spread
            low, middle, high, count = plan_table.factor(figures, place)
            cells = (place or "all", f"{count}", f"{middle:.3f}")
            ends = (f"{min(found):.3f}, {max(found):.3f}", f"{low:.2f} to {high:.2f}")
            lines.append("| " + " | ".join(cells + ends) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """The entry point. Returns 0."""
    args = _parser().parse_args(argv)
    plan_table.check_checkout()
    if jax.config.values["jax_platforms"] != "cpu":
        jax.config.update("jax_platforms", "cpu")
    figures = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    if args.list:
        print("\n".join(f"{'there  ' if row in figures else 'missing'} {row}" for row in ROWS))
        return 0
    for name in args.row:
        print(name, file=sys.stderr, flush=True)
        figures[name] = compile_row(name)
        FIGURES.write_text(json.dumps(figures, indent=1, sort_keys=True) + "\n")
    print(table(figures), summary(figures), sep="\n\n")
    return 0


if __name__ == "__main__":
    cli.run(main)
