import jax.numpy as jnp
import numpy as np
import pytest

from webssl_jax import params

TREE = {
    "encoder": {
        "blocks": {"q": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}},
        "cls_token": jnp.ones(4),
    }
}


def test_flatten_and_unflatten_are_inverse():
    flat = params.flatten(TREE)
    assert set(flat) == {"encoder/blocks/q/kernel", "encoder/blocks/q/bias", "encoder/cls_token"}
    again = params.flatten(params.unflatten(flat))
    assert list(again) == list(flat) and all(np.array_equal(again[k], flat[k]) for k in flat)


def test_the_total_is_a_whole_number_where_a_parameter_is_a_scalar():
    tree = {"scale": jnp.ones(()), "kernel": jnp.ones((1000, 2))}
    assert params.describe(tree).endswith("\nTotal: 2,001 -- 8,004 bytes")


def test_a_path_cannot_be_leaf_and_folder():
    with pytest.raises(ValueError, match="a/b"):
        params.unflatten({"a": 1, "a/b": 2})
    with pytest.raises(ValueError, match="'a' is both"):
        params.unflatten({"a/b": 2, "a": 1})


def test_the_first_matching_row_wins():
    table = ((r"q/bias$", 1), (r"bias$", 2), (r"blocks", 3))
    matched = params.flatten(params.match(table, TREE, default=0))
    assert matched == {
        "encoder/blocks/q/kernel": 3,
        "encoder/blocks/q/bias": 1,
        "encoder/cls_token": 0,
    }


def test_a_row_that_matches_nothing_is_found():
    assert params.unmatched_rows(((r"bias", 1), (r"baias", 1)), TREE) == ["baias"]


def test_count_and_bytes():
    assert params.count(TREE) == 13
    assert params.num_bytes(TREE) == 52
    assert "encoder/blocks/q/kernel" in params.describe(TREE)
