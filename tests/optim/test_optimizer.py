import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from ml_collections import ConfigDict

from webssl_jax.config import ConfigError
from webssl_jax.optim.optimizer import Optimizer
from webssl_jax.optim.tables import Tables

SHAPES = {"encoder": {"kernel": (4, 5), "bias": (5,)}, "decoder": {"kernel": (5, 3)}}


def make(clip="none", tables=None, **changes):
    optim = {
        "b1": 0.9,
        "b2": 0.95,
        "eps": 1e-8,
        "clip": clip,
        "clip_norm": 0.5,
        "moment_dtype": "float32",
        "frozen": (),
        "lr_multipliers": (),
    } | changes
    return Optimizer.from_config(ConfigDict(optim), tables or Tables(decay=((r"bias$", 0.0),)))


def values(lr, **more):
    return {"learning_rate": lr, "weight_decay": 0.1} | more


def tree(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(scale * rng.normal(size=shape), jnp.float32),
        SHAPES,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def test_ten_steps_equal_torchs_adamw():
    """With decay excluded for biases and the rate of the decoder halved. float32 on both sides:
    1e-6."""
    optimizer = make(lr_multipliers=(("^decoder/", 0.5),))
    params = tree(0)
    theirs = {
        path: torch.nn.Parameter(torch.tensor(np.asarray(x)))
        for path, x in (
            ("kernel", params["encoder"]["kernel"]),
            ("bias", params["encoder"]["bias"]),
            ("decoder", params["decoder"]["kernel"]),
        )
    }
    groups = [
        dict(params=[theirs["kernel"]], weight_decay=0.1),
        dict(params=[theirs["bias"]], weight_decay=0.0),
        dict(params=[theirs["decoder"]], weight_decay=0.1),
    ]
    torch_optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    state = optimizer.init(params)
    for step in range(10):
        lr = 0.01 * (step + 1)
        grads = tree(step + 1)
        params, state = optimizer.update(grads, state, params, values(lr))
        for group, rate in zip(torch_optimizer.param_groups, (lr, lr, lr / 2)):
            group["lr"] = rate
        for name, grad in (
            ("kernel", grads["encoder"]["kernel"]),
            ("bias", grads["encoder"]["bias"]),
            ("decoder", grads["decoder"]["kernel"]),
        ):
            theirs[name].grad = torch.tensor(np.asarray(grad))
        torch_optimizer.step()
    ours = {
        "kernel": params["encoder"]["kernel"],
        "bias": params["encoder"]["bias"],
        "decoder": params["decoder"]["kernel"],
    }
    for name, value in ours.items():
        np.testing.assert_allclose(value, theirs[name].detach().numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [0.01, 10.0])
def test_clipping_equals_torchs_globally_and_per_module(scale):
    grads = tree(3, scale)

    def torch_clip(leaves):
        leaves = [torch.nn.Parameter(torch.zeros(x.shape)) for x in leaves], leaves
        for parameter, value in zip(*leaves):
            parameter.grad = torch.tensor(np.asarray(value))
        torch.nn.utils.clip_grad_norm_(leaves[0], 0.5)
        return [p.grad.numpy() for p in leaves[0]]

    clipped, norms = make("global").clip_gradients(grads)
    for ours, theirs in zip(jax.tree.leaves(clipped), torch_clip(jax.tree.leaves(grads))):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    clipped, norms = make("per_module").clip_gradients(grads)
    for name in grads:
        for ours, theirs in zip(
            jax.tree.leaves(clipped[name]), torch_clip(jax.tree.leaves(grads[name]))
        ):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    total = np.sqrt(sum(float(norms[name]) ** 2 for name in grads))
    assert float(norms["all"]) == pytest.approx(total, rel=1e-5)


def test_frozen_parameters_do_not_move_and_hold_no_moments():
    optimizer = make(frozen=("^encoder/",))
    params = tree(0)
    state = optimizer.init(params)
    assert sum(x.size for x in jax.tree.leaves(state)) == 2 * 15 + 1
    grads = optimizer.mask_frozen(tree(1))
    assert float(optimizer.clip_gradients(grads)[1]["encoder"]) == 0.0
    new, _ = optimizer.update(grads, state, params, values(0.1))
    assert np.array_equal(new["encoder"]["kernel"], params["encoder"]["kernel"])
    assert not np.array_equal(new["decoder"]["kernel"], params["decoder"]["kernel"])


def test_a_rate_may_differ_by_block_and_follow_a_schedule():
    """SHAPES' encoder/kernel stands for four stacked blocks."""
    rates = ((r"^encoder/kernel$", (0.0, 1.0, 2.0, 0.5)), ("^decoder/", "gate"))
    optimizer = make(tables=Tables(learning_rate=rates))
    params, grads = tree(0), tree(1)
    state = optimizer.init(params)
    plain, _ = make(tables=Tables()).update(grads, state, params, values(0.1))
    for gate in (0.0, 1.0):
        new, moments = optimizer.update(grads, state, params, values(0.1, gate=gate))
        moved, whole = (
            jax.tree.map(lambda a, b: np.asarray(a - b), tree, params) for tree in (new, plain)
        )
        factor = np.array([[0.0], [1.0], [2.0], [0.5]])
        np.testing.assert_allclose(
            moved["encoder"]["kernel"], factor * whole["encoder"]["kernel"], atol=2e-7
        )
        np.testing.assert_allclose(
            moved["decoder"]["kernel"], gate * whole["decoder"]["kernel"], atol=2e-7
        )
        # a rate of zero stops the parameter, not its moments
        mu = moments.inner_state.mu["decoder"]["kernel"]
        np.testing.assert_allclose(mu, 0.1 * grads["decoder"]["kernel"], rtol=1e-4)


def test_a_table_row_that_matches_nothing_is_refused():
    with pytest.raises(ConfigError, match="encodr"):
        make(frozen=("^encodr/",)).check(tree(0))
