"""Prototypes a few at a time: the same losses, gradients, centres and figures as all at once, in a
fraction of the memory; and one head for CLS and patches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.methods.test_dino import BATCH, MICRO, VALUES, crops
from webssl_jax import params as paths
from webssl_jax.methods.dino import prototypes
from webssl_jax.models.heads import HeadConfig, Scores

METHOD = dataclasses.replace(
    MICRO,
    encoder=dataclasses.replace(MICRO.encoder, drop_path=0.0),
    ibot_head=HeadConfig(prototypes=64, bottleneck=16, hidden=32),
)


def apart(tree):
    """Student and teacher that differ, as after some steps."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape, np.float32), tree)


def run(method, variables, aux):
    """(loss output, gradients)."""

    def loss(params):
        out = method.loss(params, variables.teacher, aux, crops(0), jax.random.key(1), VALUES)
        return out.loss, out

    grads, out = jax.jit(jax.grad(loss, has_aux=True))(variables.params)
    return out, grads


@pytest.fixture(
    scope="module", params=["sinkhorn", pytest.param("softmax", marks=pytest.mark.slow)]
)
def plain(request):
    method = dataclasses.replace(METHOD, centering=request.param)
    variables = jax.jit(lambda: method.init(jax.random.key(0), method.batch_spec(BATCH)))()
    variables = variables._replace(teacher=apart(variables.teacher))
    aux = jax.tree.map(lambda x: x + jnp.linspace(-0.1, 0.1, x.size), variables.aux)
    return method, variables, aux, run(method, variables, aux)


def test_chunks_change_neither_loss_nor_gradients_nor_centres_nor_figures(plain):
    """float32: losses to 2e-6, gradients to 1e-5 of the largest of their array."""
    method, variables, aux, (whole, grads) = plain
    streamed = dataclasses.replace(method, stream_prototypes=16)
    out, their_grads = run(streamed, variables, aux)
    for name in whole.terms:
        np.testing.assert_allclose(out.terms[name], whole.terms[name], rtol=2e-6)
    for name in whole.report:
        np.testing.assert_allclose(out.report[name], whole.report[name], rtol=2e-5, err_msg=name)
    for name in whole.aux:
        np.testing.assert_allclose(out.aux[name], whole.aux[name], rtol=1e-6, atol=1e-7)
    theirs = paths.flatten(their_grads)
    for path, grad in paths.flatten(grads).items():
        atol = 1e-5 * float(jnp.abs(grad).max()) + 1e-9
        np.testing.assert_allclose(theirs[path], grad, rtol=0, atol=atol, err_msg=path)


def test_a_shared_head_is_two_heads_that_are_alike_and_share_their_gradient(plain):
    """The two-headed losses are the original's (test_dino_step.py); with the same weights in both
    heads they are those of its ``separate_head: false``, and its one head gets both gradients."""
    method, variables, aux, _ = plain
    alike = variables._replace(
        params=variables.params | {"ibot_head": variables.params["dino_head"]},
        teacher=variables.teacher | {"ibot_head": variables.teacher["dino_head"]},
    )
    two, two_grads = run(method, alike, aux)
    shared = dataclasses.replace(method, ibot_head=None)
    fresh = jax.eval_shape(lambda: shared.init(jax.random.key(0), shared.batch_spec(BATCH)))
    assert set(fresh.params) == set(fresh.teacher) == {"encoder", "dino_head"}
    assert set(fresh.aux) == set(variables.aux)  # a centre each, for CLS and for patches
    one = variables._replace(
        params={name: variables.params[name] for name in fresh.params},
        teacher={name: variables.teacher[name] for name in fresh.params},
    )
    out, grads = run(shared, one, aux)
    np.testing.assert_allclose(out.loss, two.loss, rtol=1e-6)
    wanted = {
        "encoder": two_grads["encoder"],
        "dino_head": jax.tree.map(jnp.add, two_grads["dino_head"], two_grads["ibot_head"]),
    }
    wanted = paths.flatten(wanted)
    for path, grad in paths.flatten(grads).items():
        atol = 1e-5 * float(jnp.abs(wanted[path]).max()) + 1e-9
        np.testing.assert_allclose(grad, wanted[path], rtol=0, atol=atol, err_msg=path)


def test_statistics_are_those_of_the_probabilities():
    rng = np.random.default_rng(0)
    features, kernel = (
        rng.standard_normal(shape).astype(np.float32) for shape in ((2, 12, 8), (2, 8, 48))
    )
    targets = prototypes.sinkhorn_knopp(Scores(features[0], kernel[0]), 0.5)
    student = Scores(features[1], kernel[1])
    t, s = np.exp(targets.logs()), np.asarray(jax.nn.softmax(student.logits() / 0.7))
    wanted = {
        "teacher_entropy": -(t * np.log(t)).sum(axis=1).mean(),
        "student_entropy": -(s * np.log(s)).sum(axis=1).mean(),
        "teacher_student_kl": (t * np.log(t / s)).sum(axis=1).mean(),
        "prototypes_used": len(set(t.argmax(axis=1))),
    }
    for chunk in (0, 16):
        ours = prototypes.statistics(targets, student, 0.7, chunk=chunk)
        assert {name: float(x) for name, x in ours.items()} == pytest.approx(wanted, rel=1e-5)


def temporary_bytes(chunk, rows=512, bottleneck=32, count=8192):
    """What the backward pass of a loss over all prototypes needs besides its arguments."""

    def loss(student, features, kernel):
        targets = prototypes.sinkhorn_knopp(Scores(features, kernel), 0.05, chunk=chunk)
        scores = student._replace(features=student.features[:, None])
        return prototypes.cross_entropies(targets, scores, 0.1, chunk=chunk).mean()

    features = jax.ShapeDtypeStruct((rows, bottleneck), jnp.float32)
    kernel = jax.ShapeDtypeStruct((bottleneck, count), jnp.float32)
    compiled = jax.jit(jax.grad(loss)).lower(Scores(features, kernel), features, kernel).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_a_sixteenth_of_the_prototypes_at_a_time_takes_a_fraction_of_the_memory():
    """One array of logits is 16 MiB here; the plain computation holds several of them, chunks hold
    as many of a sixteenth of the size, and a few copies of the kernel (1 MiB)."""
    whole, streamed = temporary_bytes(0), temporary_bytes(512)
    assert whole > 2 * 512 * 8192 * 4
    assert streamed < whole / 5


def test_chunks_that_do_not_divide_the_prototypes_of_both_heads_are_refused():
    for chunk in (-16, 24):  # 64 and 48 prototypes
        with pytest.raises(ValueError, match=f"stream_prototypes = {chunk} must be 0 or divide"):
            dataclasses.replace(MICRO, stream_prototypes=chunk)
