"""The conversion engine: exact both ways, strict, one tensor at a time."""

import jax
import numpy as np
import pytest

from webssl_jax import params as params_lib
from webssl_jax.config import UserError
from webssl_jax.weights import tables
from webssl_jax.weights.tables import CONV, LINEAR, Constant, Row, Table, WeightsError

POSITIONS = np.linspace(-1, 1, 12, dtype=np.float32).reshape(1, 3, 4)
TABLE = Table(
    family="toy",
    rows=(
        Row("patch/kernel", "proj.weight", CONV),
        Row("cls", "cls", tables.squeeze(0, 1)),
        Row("blocks/fc/kernel", "blocks.{i}.fc.weight", LINEAR),
        Row(("blocks/q/kernel", "blocks/k/kernel"), "blocks.{i}.qk.weight", LINEAR),
        Row("blocks/fc/bias", "blocks.{i}.fc.bias"),
    ),
    constants=(Constant("pos", lambda: POSITIONS, what="the fixed toy table"),),
    leave_out=(r"^decoder/",),
    aliases=((r"^module\.", ""),),
    ignore=(r"^pooler\.",),
)
SHAPES = {
    "patch/kernel": (2, 2, 3, 4),
    "cls": (1, 1, 4),
    "blocks/fc/kernel": (3, 4, 5),
    "blocks/q/kernel": (3, 4, 4),
    "blocks/k/kernel": (3, 4, 4),
    "blocks/fc/bias": (3, 5),
}


def make_params(seed=0):
    rng = np.random.default_rng(seed)
    return params_lib.unflatten(
        {
            k: rng.normal(size=s).astype(np.float32)
            for k, s in (SHAPES | {"decoder/w": (2,)}).items()
        }
    )


def exported():
    return dict(tables.export(make_params(), TABLE))


class InMemory:
    """An array with the manners of a tensor in a file."""

    def __init__(self, array):
        self.array, self.shape, self.dtype = array, array.shape, array.dtype

    def read(self, part=0, parts=1):
        return np.split(self.array, parts)[part]


def open_toy(tensors):
    found = {key: InMemory(value) for key, value in tensors.items()}
    return tables.open_(found, TABLE, make_params(seed=1))


def import_toy(tensors):
    return tables.read_all("toy", open_toy(tensors))


def test_export_lays_out_linear_conv_stacked_and_fused_tensors_as_pytorch_does():
    params, out = params_lib.flatten(make_params()), exported()
    assert out["proj.weight"].shape == (4, 3, 2, 2)
    assert out["proj.weight"][3, 2, 0, 1] == params["patch/kernel"][0, 1, 2, 3]
    assert out["cls"].shape == (4,)
    np.testing.assert_array_equal(out["blocks.2.fc.weight"], params["blocks/fc/kernel"][2].T)
    np.testing.assert_array_equal(out["blocks.1.qk.weight"][4:], params["blocks/k/kernel"][1].T)
    assert "blocks.3.fc.weight" not in out and not any("decoder" in key for key in out)


def test_import_of_an_export_is_bit_identical_and_so_is_its_export():
    back = import_toy(exported())
    for path, value in params_lib.flatten(back).items():
        np.testing.assert_array_equal(value, params_lib.flatten(make_params())[path])
    assert set(params_lib.flatten(back)) == set(SHAPES)
    again = dict(tables.export(back, TABLE))
    assert all(np.array_equal(again[key], value) for key, value in exported().items())


def test_layout_promises_exactly_what_export_yields():
    got = [(key, array.shape) for key, array in tables.export(make_params(), TABLE)]
    assert got == [(t.key, t.shape) for t in tables.layout(TABLE, make_params())]


def test_export_streams_one_tensor_at_a_time():
    class Counted:
        def __init__(self, shape):
            self.shape, self.dtype, self.read = shape, np.float32, []

        def __getitem__(self, block):
            self.read.append(block)
            return np.zeros(self.shape[1:], np.float32)

    params = make_params()
    params["blocks"]["fc"]["kernel"] = leaf = Counted((3, 4, 5))
    stream = tables.export(params, TABLE)
    for key, _ in stream:
        if key == "blocks.1.fc.weight":
            break
    assert leaf.read == [0, 1]


def test_import_reads_the_blocks_that_are_asked_for_and_of_fused_ones_only_the_share():
    read = []

    class Counted(InMemory):
        def read(self, part=0, parts=1):
            read.append((self.shape, part, parts))
            return super().read(part, parts)

    found = {key: Counted(value) for key, value in exported().items()}
    opened = tables.open_(found, TABLE, make_params(seed=1))
    assert read == [(POSITIONS.shape, 0, 1)]
    np.testing.assert_array_equal(
        opened["blocks"]["k"]["kernel"][2], make_params()["blocks"]["k"]["kernel"][2]
    )
    assert read[1:] == [((8, 4), 1, 2)]


def test_what_is_opened_can_be_exported_as_it_lies():
    again = dict(tables.export(open_toy(exported()), TABLE))
    assert all(np.array_equal(again[key], value) for key, value in exported().items())


def test_other_spellings_and_untrained_extras_are_accepted():
    tensors = {f"module.{key}": value for key, value in exported().items()}
    tensors["pooler.weight"] = np.zeros(3, np.float32)
    np.testing.assert_array_equal(import_toy(tensors)["cls"], make_params()["cls"])


def change(key, value):
    def apply(tensors):
        tensors[key] = value

    return apply


def poison(key, value):
    def apply(tensors):
        tensors[key] = tensors[key].copy()
        tensors[key].flat[1] = value

    return apply


@pytest.mark.parametrize(
    "damage, named",
    [
        (lambda t: t.pop("blocks.1.fc.bias"), "missing from the file: blocks.1.fc.bias"),
        (
            change("blocks.3.fc.bias", np.zeros(5, np.float32)),
            "not expected in the file: blocks.3.fc.bias",
        ),
        (change("cls", np.zeros((4, 1), np.float32)), r"cls is \(4, 1\), not \(4,\)"),
        (poison("blocks.2.qk.weight", np.nan), "NaN or infinity in blocks.2.qk.weight"),
        (poison("proj.weight", np.inf), "NaN or infinity in proj.weight"),
        (
            change("cls", np.zeros(4, np.int32)),
            "not float32, bfloat16, float16 or float64: cls is int32",
        ),
        (poison("pos", 0.5), "pos is not the fixed toy table"),
        (change("module.cls", np.zeros(4, np.float32)), "two spellings of one tensor"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_loaded(damage, named):
    tensors = exported()
    damage(tensors)
    with pytest.raises(WeightsError, match=named) as caught:
        import_toy(tensors)
    assert isinstance(caught.value, UserError) and "\n" not in str(caught.value)


def test_every_kind_of_problem_is_named_at_once():
    tensors = exported()
    del tensors["cls"]
    tensors["head.weight"] = np.zeros(1, np.float32)
    with pytest.raises(WeightsError, match="missing.*cls.*not expected.*head.weight"):
        import_toy(tensors)


def test_a_parameter_without_a_row_and_a_row_without_its_parameter_are_named():
    params = make_params()
    params["register_tokens"] = params.pop("cls")
    with pytest.raises(WeightsError, match="register_tokens.*cls"):
        list(tables.export(params, TABLE))


def test_export_of_a_diverged_model_is_refused_by_name():
    params = make_params()
    params["blocks"]["fc"]["bias"][2, 0] = np.nan
    with pytest.raises(WeightsError, match="blocks/fc/bias, block 2"):
        list(tables.export(params, TABLE))


def test_arrays_that_lie_sharded_over_devices_export_the_same():
    mesh = jax.make_mesh(
        (4,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4]
    )
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "fsdp"))
    params = make_params()
    kernel = params["blocks"]["fc"]["kernel"]
    params["blocks"]["fc"]["kernel"] = jax.device_put(kernel, sharding)
    for key, array in tables.export(params, TABLE):
        np.testing.assert_array_equal(array, exported()[key])
