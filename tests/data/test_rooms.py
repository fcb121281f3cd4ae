"""Rooms out of 3D models: depth is that of the nearest surface, things stand where they can, and
none is on both sides."""

import io
import zipfile

import numpy as np
import pytest
from PIL import Image

from tests.data.conversions import read_shards
from webssl_jax.config import UserError
from webssl_jax.corpus import furniture, rooms
from webssl_jax.data import annotations
from webssl_jax.tools import rooms as tool

HEIGHT, WIDTH, FOCAL = 30, 40, 35.0

# Corners from 0 to 1; the upper side by numbers that count from the end, two of the materials.
CUBE = """mtllib cube.mtl
v 0 0 0
v 1 0 0
v 1 1 0
v 0 1 0
v 0 0 1
v 1 0 1
v 1 1 1
v 0 1 1
vt 0.25 0.75
usemtl red
f 1/1 2/1 3/1 4/1
f 5//1 6//1 7//1 8//1
f 1 2 6 5
f 2 3 7 6
f 1 4 8 5
usemtl picture
f -6/1 -5/1 -1/1 -2/1
usemtl glass
f 1 3 7
"""
LIBRARY = """newmtl red
Kd 1 0 0
newmtl picture
map_Kd four.png
newmtl glass
Kd 0 0 1
d 0.1
"""
ROW = {
    "name": "Crate",
    "category": "Office",
    "model": "/a/cube.obj",
    "movable": "true",
    "width": "50",
    "depth": "100",
    "height": "80",
}


def catalogue(*rows):
    """An .sh3f archive with these rows, all of the same cube."""
    lines = [f"{key}#{i}={value}" for i, row in enumerate(rows) for key, value in row.items()]
    four = Image.fromarray(np.array([[[0, 255, 0], [9, 9, 9]], [[9, 9, 9]] * 2], np.uint8))
    picture, file = io.BytesIO(), io.BytesIO()
    four.resize((32, 32), Image.Resampling.NEAREST).save(picture, "PNG")
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("PluginFurnitureCatalog.properties", "\n".join(lines))
        archive.writestr("a/cube.obj", CUBE)
        archive.writestr("a/cube.mtl", LIBRARY)
        archive.writestr("a/four.png", picture.getvalue())
    return file.getvalue()


def cube():
    (model,) = furniture.read(catalogue(ROW))
    return model


def test_the_depth_of_a_pixel_is_that_of_the_nearest_plane_along_its_ray():
    far = np.array([[[-9, -9, 4], [9, -9, 4], [0, 15, 8]]], float)  # leans away
    near = np.array([[[-0.5, -0.5, 2], [0.5, -0.5, 3], [0.1, 0.6, 2.5]]])
    corners = np.concatenate([near, far])
    drawn = rooms.rasterise(corners, FOCAL, HEIGHT, WIDTH)
    x, y = np.meshgrid(np.arange(WIDTH) + 0.5, np.arange(HEIGHT) + 0.5)
    rays = np.stack([(x - WIDTH / 2) / FOCAL, (HEIGHT / 2 - y) / FOCAL, np.ones_like(x)], -1)
    assert (drawn.triangle >= 0).all() and 20 < (drawn.triangle == 0).sum() < 400
    for number, triangle in enumerate(corners):
        own = drawn.triangle == number
        normal = np.cross(triangle[1] - triangle[0], triangle[2] - triangle[0])
        expected = normal @ triangle[0] / (rays[own] @ normal)
        np.testing.assert_allclose(drawn.depth[own], expected, rtol=1e-5)
        points = drawn.shares[own] @ triangle
        np.testing.assert_allclose(points, rays[own] * expected[:, None], atol=1e-4)
    alone = rooms.rasterise(near, FOCAL, HEIGHT, WIDTH)  # it hides the far one wherever it is
    np.testing.assert_array_equal(drawn.triangle == 0, alone.triangle == 0)
    assert np.isinf(alone.depth[alone.triangle < 0]).all()


def test_many_small_triangles_give_what_two_large_ones_give():
    steps = np.linspace(-2, 2, 30)
    quads = [(a, b) for a in zip(steps, steps[1:]) for b in zip(steps, steps[1:])]
    fine = [
        [[x0, y0, 3 + x0], [x1, y0, 3 + x1], [corner, y1, 3 + corner]]
        for (x0, x1), (y0, y1) in quads
        for corner in (x0, x1)
    ] + [[[x0, y0, 3 + x0], [x0, y1, 3 + x0], [x1, y1, 3 + x1]] for (x0, x1), (y0, y1) in quads]
    whole = [[[-2, -2, 1], [2, -2, 5], [2, 2, 5]], [[-2, -2, 1], [-2, 2, 1], [2, 2, 5]]]
    found, expected = (
        rooms.rasterise(np.array(x, float), FOCAL, HEIGHT, WIDTH).depth for x in (fine, whole)
    )
    assert np.isfinite(expected).mean() > 0.3
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_model_has_the_size_of_its_catalogue_and_its_colours():
    model = cube()
    np.testing.assert_allclose(model.corners.min(axis=(0, 1)), [-0.25, 0, -0.5])
    np.testing.assert_allclose(model.corners.max(axis=(0, 1)), [0.25, 0.8, 0.5])
    assert model.name == "crate" and len(model.corners) == 12  # the pane is seen through
    colours = model.textures[model.material]
    np.testing.assert_array_equal(colours[:10].max(axis=(0, 1, 2)), [1, 0, 0])
    top = model.corners[10:]
    assert (top[..., 1] > 0.79).all()
    u, v = (model.uv[10, 0] * 32).astype(int)
    np.testing.assert_allclose(colours[10, -v, u], [0, 1, 0], atol=0.02)  # of the upper left


def test_what_hangs_is_fixed_tiny_or_of_other_rooms_is_left_out():
    turned = ROW | {"name": "Turned", "modelRotation": "0 0 1 0 1 0 -1 0 0"}
    others = [
        {"elevation": "120"},
        {"movable": "false"},
        {"category": "Vehicles"},
        {"width": "5", "depth": "5", "height": "5"},
        {"height": "400"},
        {"model": "/a/none.obj"},
    ]
    found = list(furniture.read(catalogue(turned, *(ROW | other for other in others), ROW)))
    assert [model.name for model in found] == ["turned", "crate"]
    np.testing.assert_allclose(found[0].corners.max(axis=(0, 1)), [0.25, 0.8, 0.5], rtol=1e-6)


def test_things_stand_in_the_room_apart_from_each_other_and_before_the_camera():
    size, model = np.array([4.0, 2.5, 5.0]), cube()
    counts = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        camera = rooms._camera(rng, size)
        np.testing.assert_allclose(camera.turn @ camera.turn.T, np.eye(3), atol=1e-9)
        placed = [corners for _, corners in rooms._furnish(rng, [model], size, camera)]
        boxes = [(x.min(axis=(0, 1)), x.max(axis=(0, 1))) for x in placed]
        for i, (low, high) in enumerate(boxes):
            assert (low > -1e-3).all() and (high < size).all() and high[1] == pytest.approx(0.8)
            assert all(((low > b) | (high < a)).any() for a, b in boxes[:i])
        counts.append(len(placed))
    assert min(counts) > 0 and max(counts) > 4


def test_a_room_is_as_deep_as_its_walls_and_red_where_a_red_thing_stands_before_them():
    red = cube()._replace(textures=np.tile(np.float32([1, 0, 0]), (4, 32, 32, 1)))
    shares = []
    for seed in range(6):
        image, depth = rooms.room(np.random.default_rng(seed), [red], 48, 64)
        empty = rooms.room(np.random.default_rng(seed), [cube()], 48, 64)[1]
        np.testing.assert_array_equal(depth, empty)  # colours change no depth
        assert depth.shape == (48, 64) and depth.dtype == np.float32
        assert 0.1 < depth.min() and depth.max() < 9.5
        pixels = np.asarray(image).astype(int)
        shares.append((pixels[..., 0] > 4 * pixels[..., 1:].max(axis=-1)).mean())
    assert max(shares) > 0.05


def test_shards_have_the_depth_in_metres_and_the_same_seed_gives_the_same(tmp_path):
    made = []
    for place, seed in (("a", 3), ("b", 3), ("c", 4)):
        (tmp_path / place).mkdir()
        rooms.write(tmp_path / place, "train", [cube()], 2, 48, seed, made.append)
    found = {x: read_shards(tmp_path / x) for x in "abc"}
    assert found["a"] == found["b"] != found["c"] and made == [1] * 6
    rng = np.random.default_rng(3)
    for record in found["a"].values():
        _, depth = rooms.room(rng, [cube()], 36, 48)
        np.testing.assert_allclose(annotations.depth(record), depth, atol=6e-4)


def test_what_stands_in_test_rooms_is_in_no_training_room(tmp_path, monkeypatch):
    rows = [ROW | {"name": f"Thing {chr(97 + i % 26)}"} for i in range(52)]  # two of each name
    (tmp_path / "sweethome3d-furniture_1_all.deb").touch()
    monkeypatch.setattr(rooms.packages, "read", lambda *_: {"x.sh3f": catalogue(*rows)})
    models = rooms.read(tmp_path)
    train, test = ({model.name for model in models[part]} for part in rooms.PARTS)
    assert train and test and not train & test and len(train | test) == 26
    assert sum(map(len, models.values())) == 52


def test_bad_input_of_the_tool_is_one_line(tmp_path):
    (tmp_path / "test-00000-of-00001.arrayrecord").touch()
    for flags, says in (
        (["--width", "8"], "--width 8: must be at least 32"),
        ([], "holds records; delete them"),
    ):
        with pytest.raises(UserError, match=says):
            tool.main(["--output", str(tmp_path), *flags])
