"""Classification as a method: losses, start, labels."""

import math
import pathlib

import jax
import numpy as np
import pytest

from webssl_jax import methods
from webssl_jax.config import ConfigError
from webssl_jax.data.labelled import LabelledView
from webssl_jax.data.records import Record, RecordError
from webssl_jax.data.views import RandomResizedCropView
from webssl_jax.methods import losses

from .test_every_method import batch_of, load


def test_losses_and_gradients_are_those_of_torch():
    """softmax, smoothing, sigmoid summed over classes (big_vision's), mixed targets."""
    golden = np.load(pathlib.Path(__file__).parent / "golden" / "supervised_losses.npz")
    logits, mixed = golden["logits"], golden["mixup/targets"]
    plain = np.eye(10, dtype=np.float32)[golden["labels"]]
    softmax, sigmoid = losses.softmax_cross_entropy, losses.sigmoid_cross_entropy
    for name, value, loss in (
        ("softmax", 2.5491464138031006, lambda x: softmax(x, plain)),
        ("softmax_smooth0.1", 2.5817220211029053, lambda x: softmax(x, plain, 0.1)),
        ("softmax_mixup", 2.9830539226531982, lambda x: softmax(x, mixed)),
        ("sigmoid", 8.815146446228027, lambda x: sigmoid(x, plain)),
        ("sigmoid_mixup", 9.249054908752441, lambda x: sigmoid(x, mixed)),
    ):
        np.testing.assert_allclose(loss(logits), value, rtol=1e-6, err_msg=name)
        np.testing.assert_allclose(
            jax.grad(loss)(logits), golden[f"{name}/grad"], atol=1e-6, err_msg=name
        )


def test_all_classes_are_alike_before_the_first_step():
    method = methods.create(load("supervised"))

    @jax.jit
    def loss(key):
        variables = method.init(key, method.batch_spec(2))
        return method.loss(*variables, batch_of(method, 0), key, {}).loss

    np.testing.assert_allclose(loss(jax.random.key(0)), math.log(18), rtol=1e-6)


def test_a_record_without_a_label_of_the_classes_is_damaged():
    view = LabelledView(RandomResizedCropView(16), ("cat", "dog"))
    for label, words in ((None, "no label"), ("fish", "label 'fish' is no class")):
        with pytest.raises(RecordError, match=words):
            view(Record(b"", (), "key", 1, 1, "source", label), np.random.default_rng(0))


def test_classes_come_from_a_file_of_lines_and_a_wrong_list_is_refused(tmp_path):
    config = load("supervised")
    (tmp_path / "classes.txt").write_text("cat\ndog\n\n")
    with config.unlocked():
        config.method.classes = str(tmp_path / "classes.txt")
    assert methods.create(config).classes == ("cat", "dog")
    for wrong, words in (("", "name the labels"), ("cat,cat", "2 names, 1 of them different")):
        with config.unlocked():
            config.method.classes = wrong
        with pytest.raises(ConfigError, match=words):
            methods.create(config)
