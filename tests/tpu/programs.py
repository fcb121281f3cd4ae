"""Small programs, compiled for TPU slices that are not here."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from webssl_jax.methods.dino import prototypes
from webssl_jax.models.blocks import block_stack
from webssl_jax.models.heads import Head, HeadConfig
from webssl_jax.models.sizes import BlockConfig
from webssl_jax.sharding import mesh as meshes
from webssl_jax.sharding import rules, slices

LAYERS, WIDTH, ROWS = 6, 512, 2048  # of the loop


def mesh_of(name: str) -> Mesh:
    return meshes.create(ConfigDict({"replica": 1, "fsdp": -1, "tensor": 1}), devices_of(name))


@functools.cache
def devices_of(name: str) -> list[jax.Device]:
    return slices.find(name).devices()


def lower(name: str, mesh: Mesh) -> tuple[jax.stages.Lowered, float]:
    """The program and how many flops its jaxpr has."""
    from tests.tpu import jaxpr_flops

    fn, args, out = PROGRAMS[name](mesh)
    lowered = jax.jit(fn, out_shardings=out).lower(*args)
    return lowered, jaxpr_flops.count(fn, *args)


@functools.cache
def compiled(name: str, slice_name: str) -> tuple[jax.stages.Compiled, float]:
    lowered, flops = lower(name, mesh_of(slice_name))
    return lowered.compile(), flops


def _loop(mesh: Mesh):
    """The gradient of a scan over dense layers that run again in the backward pass; weights cut
    along their input, as ours are."""
    weights = jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), jnp.float32, sharding=_cut(mesh, 1))
    x = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.bfloat16, sharding=meshes.batch_sharding(mesh))

    @jax.checkpoint
    def layer(h, w):
        return jnp.tanh(h @ w.astype(h.dtype)), None

    def loss(weights, x):
        h, _ = jax.lax.scan(layer, x, weights)
        return jnp.mean(h.astype(jnp.float32) ** 2)

    return jax.grad(loss), (weights, x), weights.sharding


def _trunk(mesh: Mesh):
    """Two of our blocks, forward and backward."""
    config = BlockConfig(
        width=256, depth=2, heads=4, mlp="swiglu", layer_scale=1e-5, dtype="bfloat16", remat="named"
    )
    stack = block_stack(config, train=True)
    tokens = jax.ShapeDtypeStruct((32, 65, 256), jnp.bfloat16, sharding=_cut(mesh, 0))
    slots = jnp.zeros(2, jnp.int32)

    def forward(params, x):
        (x, _), _ = stack.apply({"params": params}, (x, None), slots)
        return jnp.mean(x.astype(jnp.float32) ** 2)

    shapes = jax.eval_shape(lambda: stack.init(jax.random.key(0), (_zeros(tokens), None), slots))
    params = _sharded({"blocks": shapes["params"]}, mesh)["blocks"]
    return jax.grad(forward), (params, tokens), jax.tree.map(lambda x: x.sharding, params)


def _head(mesh: Mesh):
    """DINO's head, Sinkhorn's targets and the cross-entropy, forward and backward."""
    head = Head(HeadConfig(prototypes=4096, bottleneck=128, hidden=512), "bfloat16")
    tokens = jax.ShapeDtypeStruct((64, 2, 256), jnp.bfloat16, sharding=_cut(mesh, 0))

    def forward(params, x):
        student = head.apply({"params": params}, x)
        teacher = jax.lax.stop_gradient(student).reshape(-1)
        targets = prototypes.sinkhorn_knopp(teacher, 0.07)
        return prototypes.cross_entropies(targets, student, 0.1).mean()

    shapes = jax.eval_shape(lambda: head.init(jax.random.key(0), _zeros(tokens)))["params"]
    params = _sharded({"dino_head": shapes}, mesh)["dino_head"]
    return jax.grad(forward), (params, tokens), jax.tree.map(lambda x: x.sharding, params)


def _too_large(mesh: Mesh):
    """16 GiB in and 16 GiB out of every device: a v5e has 15.75."""
    x = jax.ShapeDtypeStruct((mesh.size * 32, 2**28), jnp.bfloat16, sharding=_cut(mesh, 0))
    return (lambda x: x + 1), (x,), x.sharding


def _cut(mesh: Mesh, axis: int) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(*(None,) * axis, "fsdp"))


def _sharded(shapes, mesh: Mesh):
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        shapes,
        rules.shardings(shapes, mesh),
    )


def _zeros(x: jax.ShapeDtypeStruct) -> jax.Array:
    return jnp.zeros(x.shape, x.dtype)


PROGRAMS = {"loop": _loop, "trunk": _trunk, "head": _head, "too_large": _too_large}
