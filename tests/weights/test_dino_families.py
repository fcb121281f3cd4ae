"""Web-DINO's weights in every family: in and out bit by bit, whatever the blocks are called; what
does not fit is named; a run begins where a teacher's file left off."""

import dataclasses
import json
import logging
import re

import jax
import ml_dtypes
import numpy as np
import pytest
import torch

from tests.weights import samples
from webssl_jax import params, publish
from webssl_jax.config import UserError
from webssl_jax.methods.dino.method import DINO, View
from webssl_jax.models import position, sizes
from webssl_jax.models.heads import HeadConfig
from webssl_jax.weights import dino, load, shapes, tables
from webssl_jax.weights.families import FAMILIES, table_of
from webssl_jax.weights.init_from import from_weights
from webssl_jax.weights.networks import Networks, template_of
from webssl_jax.weights.stored import WeightsError

HEADS = ("dino_head", "ibot_head")


@pytest.fixture(scope="module")
def networks():
    return samples.make_dino()


@pytest.fixture(scope="module")
def weights(networks):
    return samples.make_params(networks)


@pytest.fixture(scope="module")
def files(networks, weights, tmp_path_factory):
    """{family: what was written}; never to be changed."""
    root = tmp_path_factory.mktemp("files")
    return {family: samples.write(family, root, networks, weights) for family in samples.DINO}


def state_dict(path):
    """{name: tensor} of a .pth, whatever it stands under."""
    saved = torch.load(path, weights_only=True)
    return dict(saved.get("teacher", saved))


def save(tensors, path, key="teacher"):
    torch.save({key: tensors} if key else tensors, path)
    return path


def assert_equal(tree, weights, leave=()):
    got, wanted = params.flatten(tree), params.flatten(weights)
    assert set(got) == set(wanted) - set(leave)
    for path, value in got.items():
        np.testing.assert_array_equal(value, wanted[path], err_msg=path)


def parts_of(family):
    return {"dinov2-heads": HEADS, "dinov2-teacher": ("encoder", *HEADS)}.get(family, ("encoder",))


@pytest.mark.parametrize("family", samples.DINO)
def test_import_of_an_export_is_bit_identical(files, networks, weights, family):
    loaded = load.load(files[family], heads=None if family == "dinov2-heads" else 2)
    parts = parts_of(family)
    assert loaded.family == family and loaded.left == ()
    assert loaded.kind == {"dinov2-heads": "heads", "dinov2-teacher": "dino"}.get(family, "encoder")
    leave = {"encoder/mask_token"} if family == "timm" else ()
    assert_equal(loaded.params, {part: weights[part] for part in parts}, leave)
    for part in parts[1:] or (parts if family == "dinov2-heads" else ()):
        assert getattr(loaded.networks, part) == getattr(networks, part)
    if "encoder" in parts:
        ours, theirs = networks.encoder, loaded.networks.encoder
        same = {"mask_token": ours.mask_token and family != "timm", "mlp_hidden": ours.hidden}
        same |= {"position_resize": FAMILIES[family].resize, "dtype": theirs.dtype}
        assert theirs == dataclasses.replace(ours, **same)


@pytest.mark.parametrize("family", samples.DINO)
def test_bfloat16_is_written_everywhere_and_comes_back_as_it_was_rounded(
    tmp_path, networks, weights, family
):
    rounded = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float32), weights)
    path = samples.write(family, tmp_path, networks, weights, "bfloat16", max_file_bytes=20_000)
    stored = load.open_files(path).tensors.values()
    assert {x.dtype.name for x in stored} == {"bfloat16"}
    assert len({x.file for x in stored}) > 1 or not FAMILIES[family].config
    loaded = load.load(path, heads=None if family == "dinov2-heads" else 2)
    assert loaded.dtype == "bfloat16"
    leave = {"encoder/mask_token"} if family == "timm" else ()
    assert_equal(loaded.params, {part: rounded[part] for part in parts_of(family)}, leave)


@pytest.mark.parametrize("given", ({"heads": 2}, {"decoder_heads": 2}), ids=str)
def test_attention_heads_are_refused_where_nothing_has_attention(files, given):
    with pytest.raises(UserError, match="=2: .* is dinov2-heads and has no .*; leave it out"):
        load.open_(files["dinov2-heads"], **given)


@pytest.mark.parametrize("family", ("dinov2-pth", "timm", "hf-dinov2-registers"))
@pytest.mark.parametrize(
    "encoder",
    (
        {"num_registers": 3},
        {"num_registers": 3, "mlp": "gelu", "qkv_bias": False},
        {"num_registers": 3, "position": "sincos"},
    ),
    ids=str,
)
def test_registers_mlp_and_positions_of_every_kind_come_back(tmp_path, family, encoder):
    """timm adds the CLS token's position to the token, so there the sum is what comes back."""
    networks = samples.make_dino(**encoder)
    weights = {"encoder": samples.make_params(networks)["encoder"]}
    loaded = load.load(samples.write(family, tmp_path, networks, weights), heads=2)
    c = loaded.networks.encoder
    assert loaded.family == family
    assert (c.mlp, c.num_registers) == (networks.encoder.mlp, 3)
    if family == "timm":
        del weights["encoder"]["mask_token"]
        if c.position == "learned":
            e = weights["encoder"]
            e["cls_token"] = e["cls_token"] + e["pos_embed"][:, :1]
            e["pos_embed"] = e["pos_embed"] * (np.arange(17) > 0)[None, :, None].astype(np.float32)
    assert_equal(loaded.params, weights)
    again = publish.export_loaded(loaded, family, tmp_path / "again.pth")
    assert_equal(load.load(again, heads=2).params, loaded.params)


def test_a_teacher_goes_into_every_format_and_back_across_them(tmp_path, files, weights):
    opened = load.open_(files["dinov2-teacher"])
    for i, family in enumerate(("dinov2-pth", "hf-dinov2", "dinov2-heads", "dinov2-teacher")):
        output = publish.export_loaded(opened, family, tmp_path / f"{i}.pth")
        back = load.load(output, heads=None if family == "dinov2-heads" else 2)
        assert_equal(back.params, {part: weights[part] for part in parts_of(family)})
    with pytest.raises(WeightsError, match="dinov2-teacher: needs heads, and .* has none"):
        publish.export_loaded(load.open_(files["timm"]), "dinov2-teacher", tmp_path / "x.pth")
    with pytest.raises(WeightsError, match="hf-dinov2: needs an encoder, and .* has none"):
        publish.export_loaded(load.open_(files["dinov2-heads"]), "hf-dinov2", tmp_path / "x")


def test_the_five_chunks_of_depth_26_keep_the_global_numbers():
    """Six blocks a chunk, and two that are left over: as DINOv2 builds them with block_chunks=4."""
    names = [f"backbone.blocks.{i}.norm1.weight" for i in range(26)]
    chunked = dino.chunked_names(names, depth=26, chunks=4)
    for i, name in enumerate(chunked):
        assert name == f"backbone.blocks.{i // 6}.{i}.norm1.weight"
    assert chunked[25] == "backbone.blocks.4.25.norm1.weight"
    with pytest.raises(WeightsError, match="2 blocks cannot be cut into 3 chunks"):
        dino.chunked_names([], depth=2, chunks=3)


@pytest.mark.parametrize("family", ("dinov2-pth", "dinov2-teacher"))
def test_chunked_and_plain_names_load_the_same(tmp_path, files, networks, weights, family):
    chunked = samples.write(family, tmp_path, networks, weights, chunks=2)  # of three: 1, 1, 1
    names = state_dict(chunked)
    assert any(name.endswith("blocks.2.2.ls1.gamma") for name in names)
    assert set(names) == set(dino.chunked_names(list(state_dict(files[family])), 3, 2))
    plain = load.load(files[family], heads=2)
    assert_equal(load.load(chunked, heads=2).params, plain.params)
    with pytest.raises(WeightsError, match="hf-dinov2: has no chunks"):
        samples.write("hf-dinov2", tmp_path, networks, weights, chunks=2)


RENAMED = {
    "module": lambda name: f"module.{name}",
    "fsdp": lambda name: re.sub(r"(blocks\.\d+|head)\.", r"\1._fsdp_wrapped_module.", name),
    "whole checkpoint": lambda name: f"teacher.{name}",
    "bare encoder": lambda name: name.removeprefix("backbone."),
    "new weight_norm": lambda name: name.replace(
        "weight_g", "parametrizations.weight.original0"
    ).replace("weight_v", "parametrizations.weight.original1"),
}


@pytest.mark.parametrize("how", RENAMED)
def test_other_spellings_of_a_teacher_load_the_same(tmp_path, files, weights, how):
    tensors = state_dict(files["dinov2-teacher"])
    renamed = {RENAMED[how](name): x for name, x in tensors.items()}
    if how == "whole checkpoint":  # with a student beside it, and a loss's centre
        renamed |= {f"student.{name}": x + 1 for name, x in tensors.items()}
        renamed["dino_loss.center"] = torch.zeros(1, 24)
    loaded = load.load(save(renamed, tmp_path / "x.pth"), heads=2)
    assert loaded.family == "dinov2-teacher" and loaded.inside == "teacher"
    assert_equal(loaded.params, weights)


@pytest.mark.parametrize("key", ("teacher", "student", "model", ""))
def test_a_backbone_loads_from_under_any_key(tmp_path, files, weights, key):
    tensors = {f"backbone.{name}": x for name, x in state_dict(files["dinov2-pth"]).items()}
    loaded = load.load(save(tensors, tmp_path / "x.pth", key), heads=2)
    assert (loaded.family, loaded.inside) == ("dinov2-pth", key)
    assert_equal(loaded.params, {"encoder": weights["encoder"]})


def test_a_teacher_whose_losses_share_one_head_loads_without_the_other(tmp_path, files, weights):
    tensors = state_dict(files["dinov2-teacher"])
    tensors = {name: x for name, x in tensors.items() if not name.startswith("ibot")}
    loaded = load.load(save(tensors, tmp_path / "x.pth"), heads=2)
    assert loaded.family == "dinov2-teacher" and loaded.networks.ibot_head is None
    assert_equal(loaded.params, {name: weights[name] for name in ("encoder", "dino_head")})


@pytest.mark.parametrize("layers", (1, 2))
def test_heads_of_other_depths_come_back(tmp_path, layers):
    head = HeadConfig(prototypes=10, bottleneck=6, hidden=5 if layers > 1 else 1, layers=layers)
    networks = Networks(dino_head=head, head_input=8)
    weights = samples.make_params(networks)
    loaded = load.load(samples.write("dinov2-heads", tmp_path, networks, weights))
    assert loaded.networks.dino_head == head
    assert_equal(loaded.params, weights)


@pytest.mark.parametrize("size", ("300m", "1b", "2b", "3b", "5b", "7b"))
def test_every_published_size_has_the_originals_number_of_parameters_and_is_known(size):
    c = sizes.web_dino(size)
    assert shapes.size_name(c) == f"web-dino-{size}"
    assert shapes.known_heads({"width": c.width, "depth": c.depth}) == c.heads
    layout = tables.layout(table_of("dinov2-pth", Networks(c)), template_of(Networks(c)))
    counts = dict(
        [("300m", 303_655_168), ("1b", 1_134_771_200), ("2b", 2_084_237_568)]
        + [("3b", 2_948_317_184), ("5b", 4_938_338_816), ("7b", 6_450_170_880)]
    )
    assert sum(int(np.prod(t.shape)) for t in layout) == counts[size]
    # timm makes whole numbers of the ratio by cutting
    ratio = FAMILIES["timm"].config(Networks(c))["model_args"]["mlp_ratio"]
    assert int(c.width * ratio) == 2 * c.hidden


NAMES = {  # a tensor of the encoder, of its packed MLP, and the last one
    "dinov2-pth": ("blocks.1.ls2.gamma", "blocks.2.mlp.w12.weight", "norm.bias"),
    "dinov2-teacher": (
        "backbone.blocks.1.ls2.gamma",
        "backbone.blocks.2.mlp.w12.weight",
        "ibot_head.last_layer.weight_v",
    ),
    "dinov2-heads": (
        "dino_head.mlp.2.bias",
        "dino_head.mlp.4.weight",
        "ibot_head.last_layer.weight_g",
    ),
    "hf-dinov2": (
        "encoder.layer.1.layer_scale2.lambda1",
        "encoder.layer.2.mlp.weights_in.weight",
        "layernorm.bias",
    ),
    "timm": ("blocks.1.ls2.gamma", "blocks.2.mlp.fc1.weight", "norm.bias"),
}


@pytest.mark.parametrize("family", samples.DINO)
@pytest.mark.parametrize("kind", ("missing", "another shape", "NaN", "not expected", "twice"))
def test_what_does_not_fit_is_refused_by_name(tmp_path, files, family, kind):
    small, matrix, last = NAMES[family]

    again = f"{'dinov2' if family == 'hf-dinov2' else 'module'}.{small}"  # another spelling

    def change(t):
        if kind == "missing":
            del t[small]
        elif kind == "another shape":
            t[matrix] = t[matrix][:-1].copy()
        elif kind == "NaN":
            t[last].reshape(-1)[-1] = float("nan")
        else:
            t["blocks.0.attn.scale" if kind == "not expected" else again] = t[small]

    named = {"missing": small, "another shape": matrix, "NaN": last, "not expected": "attn.scale"}
    named["twice"] = f"{small} and {again} are two spellings of one tensor"
    path = samples.damaged(files[family], family, tmp_path, change)
    with pytest.raises(WeightsError, match=re.escape(named[kind])) as caught:
        load.load(path, heads=None if family == "dinov2-heads" else 2)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    "change",
    (
        {"mlp_ratio": 3},
        {"mlp_ratio": 4.5},
        {"use_swiglu_ffn": False},
        {"use_mask_token": False},
        {"num_hidden_layers": 2},
        {"image_size": 224},
        {"layer_norm_eps": 0},
        {"hidden_act": "silu"},
        {"model_type": "vit"},
        {"model_type": "dinov2_with_registers"},
    ),
    ids=str,
)
def test_a_config_that_disagrees_is_refused_by_name(tmp_path, files, change):
    path = samples.damaged(files["hf-dinov2"], "hf-dinov2", tmp_path, lambda tensors: None)
    config = json.loads((path / "config.json").read_text()) | change
    (path / "config.json").write_text(json.dumps(config))
    name = "num_register_tokens" if "with" in str(change) else next(iter(change))
    with pytest.raises(WeightsError, match=name):
        load.open_(path)


def test_what_transformers_cannot_compute_is_not_written(tmp_path):
    for family, encoder, named in (
        ("hf-dinov2", {"mlp_hidden": 50}, "an MLP of 50 at width 32 follows from no"),
        ("hf-dinov2", {"layer_scale": None}, "lacks: encoder/blocks/layer_scale1/gamma"),
        ("hf-dinov2", {"num_registers": 2}, "no place for our parameter encoder/register_tokens"),
        ("hf-dinov2-registers", {}, "lacks: encoder/register_tokens"),
        ("mae-pth", {}, "mae-pth: these weights have no decoder"),
        ("hf-vit", {}, "no place for our parameter"),
        ("dinov2-pth", {"norm_eps": 1e-5}, "norm_eps"),
    ):
        with pytest.raises(WeightsError, match=named):
            samples.write(family, tmp_path, samples.make_dino(**encoder))
    assert list(tmp_path.iterdir()) == []


# config.init_from.


def make_method(networks, **fields):
    encoder = networks.encoder
    view = View(global_size=encoder.image_size, local_size=16, local_count=2)
    parts = {name: getattr(networks, name) for name in ("encoder", *HEADS)}
    return DINO(**parts | {"group_images": 2, "view": view} | fields)


def start(path, method):
    """(filled params, filled teacher, what they were): two trees of other numbers before."""
    fresh = [samples.make_params(Networks.of(method), seed) for seed in (1, 2)]
    fresh = [jax.tree.map(jax.numpy.asarray, tree) for tree in fresh]
    filled = from_weights(str(path), method, {"params": fresh[0], "teacher": fresh[1]})
    return filled["params"], filled["teacher"], fresh


def losses_of(method, pairs):
    """{term: value} of one batch for each pair of a student and a teacher."""
    rng = np.random.default_rng(0)
    batch = {
        name: rng.integers(0, 256, spec.shape, np.uint8)
        for name, spec in method.batch_spec(2).items()
    }

    def terms(student, teacher):
        values = {"teacher_temperature": 0.07}
        return method.loss(student, teacher, {}, batch, jax.random.key(0), values).terms

    # compiled as it stands: optimising takes longer than all the rest of the test
    loss = jax.jit(terms, compiler_options={"xla_backend_optimization_level": 0})
    return [{name: float(x) for name, x in loss(*pair).items()} for pair in pairs]


def test_a_teacher_file_resumes_with_the_loss_it_left_off_at(
    tmp_path, files, networks, weights, caplog
):
    """Student and teacher begin as the teacher, heads and all, so the loss of a batch is that of
    the teacher against itself, bit by bit; with other heads it is not."""
    method = make_method(networks)
    with caplog.at_level(logging.INFO):
        student, teacher, fresh = start(files["dinov2-teacher"], method)
    assert_equal(student, weights)
    assert_equal(teacher, weights)
    heads = {name: fresh[0][name] for name in HEADS}
    pairs = (weights, weights), (student, teacher), (student | heads, teacher | heads)
    before, after, other = losses_of(method, pairs)
    assert after == before and all(after[name] != other[name] for name in after if name != "koleo")
    line = caplog.messages[-1]
    assert "(dinov2-teacher, web-dino-" not in line and "its teacher): took the encoder" in line
    assert "and the dino_head and the ibot_head for student and teacher alike" in line
    assert "fresh" not in line and "left in the file: nothing" in line
    assert "positions taken (4x4 patches); other sizes by model.position_resize=offset, as" in line


def test_heads_of_another_shape_are_left_and_named(files, networks, weights, caplog):
    other = dataclasses.replace(networks.ibot_head, prototypes=32)
    method = make_method(networks, ibot_head=other)
    with caplog.at_level(logging.INFO):
        student, _, fresh = start(files["dinov2-teacher"], method)
    assert_equal(student["dino_head"], weights["dino_head"])
    assert_equal(student["ibot_head"], fresh[0]["ibot_head"])
    line = caplog.messages[-1]
    assert "left in the file: the ibot_head (prototypes = 16, not 32)" in line
    assert "fresh: ibot_head" in line


@pytest.mark.parametrize("family", ("dinov2-pth", "hf-dinov2", "timm"))
def test_an_encoder_alone_starts_heads_fresh_and_says_so(files, networks, weights, caplog, family):
    method = make_method(networks)
    with caplog.at_level(logging.INFO):
        student, teacher, fresh = start(files[family], method)
    left = {"encoder/mask_token"} if family == "timm" else set()
    for tree, before in ((student, fresh[0]), (teacher, fresh[1])):
        kept = {name: x for name, x in params.flatten(tree).items() if name in left}
        taken = {k: x for k, x in params.flatten(tree["encoder"]).items()}
        for path, value in taken.items():
            wanted = before if f"encoder/{path}" in kept else weights
            np.testing.assert_array_equal(value, params.flatten(wanted["encoder"])[path])
        assert_equal({k: tree[k] for k in HEADS}, {k: before[k] for k in HEADS})
    fresh_ones = "fresh: dino_head, ibot_head" + (", encoder/mask_token" if left else "")
    assert fresh_ones in caplog.messages[-1]
    theirs = FAMILIES[family].resize
    same = "as the file's code" if theirs == "offset" else f"where the file's code has {theirs}"
    assert same in caplog.messages[-1]


def test_an_encoder_and_its_heads_can_come_from_two_files(files, networks, weights, caplog):
    both = f"{files['dinov2-pth']},{files['dinov2-heads']}"
    with caplog.at_level(logging.INFO):
        student, teacher, _ = start(both, make_method(networks))
    assert_equal(student, weights)
    assert_equal(teacher, weights)
    assert not any("fresh" in line for line in caplog.messages)
    wider = samples.make_dino(width=48, heads=3)
    with pytest.raises(WeightsError, match="nothing that fits.*for an encoder of width 32"):
        start(files["dinov2-heads"], make_method(wider))


@pytest.mark.parametrize(
    "names, named",
    (
        ("dinov2-heads", "has no encoder; give ENCODER.pth,HEADS.pth"),
        ("dinov2-teacher,dinov2-heads", "two files have the dino_head"),
        ("dinov2-pth,", "an empty name between commas"),
        ("dinov2-pth,nothing.pth", "nothing.pth: no such file"),
    ),
)
def test_a_list_of_files_that_makes_no_start_is_refused_before_anything_is_read(
    files, networks, caplog, names, named
):
    paths = ",".join(str(files.get(name, name)) for name in names.split(","))
    with caplog.at_level(logging.INFO), pytest.raises(UserError, match=named):
        start(paths, make_method(networks))
    assert not caplog.messages


def test_a_head_of_one_layer_has_no_hidden_width_to_disagree_about(tmp_path, caplog):
    networks = dataclasses.replace(
        samples.make_dino(), dino_head=HeadConfig(10, 6, layers=1), ibot_head=None
    )
    path = samples.write("dinov2-teacher", tmp_path, networks)
    with caplog.at_level(logging.INFO):
        start(path, make_method(networks))
    assert "took the encoder and the dino_head" in caplog.messages[-1]


@pytest.mark.parametrize("mode", ("offset", "plain", "antialias"))
def test_positions_are_resized_as_the_run_says(files, networks, weights, caplog, mode):
    larger = dataclasses.replace(networks.encoder, image_size=48, position_resize=mode)
    method = make_method(dataclasses.replace(networks, encoder=larger))
    with caplog.at_level(logging.INFO):
        student, _, _ = start(files["dinov2-teacher"], method)
    table = weights["encoder"]["pos_embed"][0]
    resized = position.INTERPOLATIONS[mode].resize(table[1:], (4, 4), (6, 6))
    np.testing.assert_allclose(student["encoder"]["pos_embed"][0, 1:], resized, atol=1e-6)
    assert f"resized from 4x4 to 6x6 patches ({mode})" in caplog.messages[-1]


@pytest.mark.parametrize(
    "theirs, ours, named",
    (
        ({"num_registers": 2}, {}, "this network has no encoder/register_tokens"),
        ({"num_registers": 2}, {"num_registers": 4}, "encoder/register_tokens is .1, 2, 32., not"),
        ({}, {"num_registers": 2}, "has nothing for encoder/register_tokens"),
        ({}, {"layer_scale": None}, "this network has no encoder/blocks/layer_scale1/gamma"),
        ({"mlp": "gelu"}, {}, "another encoder: .*mlp = gelu, not swiglu"),
    ),
    ids=str,
)
def test_a_file_of_another_network_is_refused_in_one_line(tmp_path, theirs, ours, named):
    path = samples.write("dinov2-pth", tmp_path, samples.make_dino(**theirs))
    with pytest.raises(WeightsError, match=named) as caught:
        start(path, make_method(samples.make_dino(**ours)))
    assert "\n" not in str(caught.value)
