import os

import jax
import jax.numpy as jnp
import pytest

from tests.tpu import programs
from webssl_jax.config import UserError
from webssl_jax.plan import command
from webssl_jax.plan import training as plan
from webssl_jax.sharding import compiler_options, slices
from webssl_jax.sharding import mesh as meshes
from webssl_jax.train_step import jit_train_step


def test_every_generation_has_its_row():
    assert {chip.device_kind for chip in slices.CHIPS.values()} <= set(compiler_options.OPTIONS)


def test_a_cpu_has_none():
    assert compiler_options.of(jax.sharding.Mesh(jax.devices(), ("fsdp",))) == {}


def lowered(mesh):
    """A train step for ``mesh`` that adds 1 to its state."""
    whole = meshes.replicated(mesh)
    x = jax.ShapeDtypeStruct((8, 128), jnp.float32, sharding=whole)
    step = jit_train_step(lambda state, batch, cause: (state + 1, batch, cause), x, mesh)
    batch = jax.ShapeDtypeStruct((8, 128), jnp.float32, sharding=meshes.batch_sharding(mesh))
    return step.lower(x, batch, jax.ShapeDtypeStruct((), jnp.int32, sharding=whole))


@pytest.mark.parametrize("name", ["v4-8", "v5e-4", "v5p-8", "v6e-4", "tpu7x-8"])
def test_the_compiler_knows_all_options_and_takes_them_for_the_train_step(name, monkeypatch):
    mesh = programs.mesh_of(name)
    lowered(mesh).compile()
    kind = mesh.devices.flat[0].device_kind
    monkeypatch.setitem(compiler_options.OPTIONS, kind, {"xla_tpu_of_nobody": True})
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_tpu_of_nobody"):
        lowered(mesh).compile()


@pytest.mark.parametrize("option", ["xla_tpu_of_nobody=1", "xla_tpu_scoped_vmem_limit_kib=wide"])
def test_an_option_or_value_that_the_compiler_does_not_know_is_refused(option):
    with pytest.raises(UserError, match=option.split("=")[0]):
        plan.compile_or_refuse(lowered(programs.mesh_of("v5e-4")), command.read_options([option]))


def test_libtpu_gets_its_flags_once_and_those_of_the_user_stay(monkeypatch):
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--a=1")
    for _ in range(2):
        compiler_options.set_libtpu_flags()
    ours = "--fibers_default_thread_stack_size=1048576"
    assert os.environ["LIBTPU_INIT_ARGS"] == f"--a=1 {ours}"
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--fibers_default_thread_stack_size=9")
    compiler_options.set_libtpu_flags()
    assert os.environ["LIBTPU_INIT_ARGS"] == "--fibers_default_thread_stack_size=9"


def test_options_of_the_command_line_are_numbers_truths_or_words():
    given = ["a=8", "b=true", "c=false", "d=x=y"]
    assert command.read_options(given) == {"a": 8, "b": True, "c": False, "d": "x=y"}
    with pytest.raises(UserError, match="NAME=VALUE"):
        command.read_options(["a"])
