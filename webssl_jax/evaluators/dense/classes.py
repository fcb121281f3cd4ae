"""The classes of segmentation data sets: their names, the numbers that stand for them in the masks
as the data sets come, and colours to draw them."""

from __future__ import annotations

import pathlib

import numpy as np

from webssl_jax.config import UserError
from webssl_jax.data.dense_views import IGNORE, ClassTable

# ADE20K's masks hold 1 ... 150; 0 is "other", which is no class (mmsegmentation: reduce_zero_label)
_ADE20K = """wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet,
sidewalk, person, earth, door, table, mountain, plant, curtain, chair, car, water, painting, sofa,
shelf, house, sea, mirror, rug, field, armchair, seat, fence, desk, rock, wardrobe, lamp, bathtub,
railing, cushion, base, box, column, signboard, chest of drawers, counter, sand, sink, skyscraper,
fireplace, refrigerator, grandstand, path, stairs, runway, case, pool table, pillow, screen door,
stairway, river, bridge, bookcase, blind, coffee table, toilet, flower, book, hill, bench,
countertop, stove, palm, kitchen island, computer, swivel chair, boat, bar, arcade machine, hovel,
bus, towel, light, truck, tower, chandelier, awning, streetlight, booth, television receiver,
airplane, dirt track, apparel, pole, land, bannister, escalator, ottoman, bottle, buffet, poster,
stage, van, ship, fountain, conveyer belt, canopy, washer, plaything, swimming pool, stool, barrel,
basket, waterfall, tent, bag, minibike, cradle, oven, ball, food, step, tank, trade name, microwave,
pot, animal, bicycle, lake, dishwasher, screen, blanket, sculpture, hood, sconce, vase,
traffic light, tray, ashcan, fan, pier, crt screen, plate, monitor, bulletin board, shower,
radiator, glass, clock, flag"""
# The colours of its own viewer, three bytes a class; two of them (road and skyscraper) are alike.
_ADE20K_COLOURS = """
787878b4787806e6e650323204c8037878508c8c8ccc05ffe6e6e604fa07e005ffebff0796053d78784608ff33ff0652
8fff8cccff04ff3307cc46030066c83de6faff06330b66ffff0747ff09e00907e6dcdcdcff095c7009ff08ffd607ffe0
ffb8060aff47ff290a07ffffe0ff086608ffff3d06ffc207ff7a0800ff14ff0829ff05990633ffeb0cffa0961400a3ff
8c8c8cfa0a0f14ff001fff00ff1f00ffe00099ff000000ffff470000ebff00adff1f00ff0bc8c8ff520000fff5003dff
00ff7000ff85ff0000ffa300ff6600c2ff00008fff33ff000052ff00ff2900ffad0a00ffadff0000ff99ff5c00ff00ff
ff00f5ff0066ffad00ff0014ffb8b8001fff00ff3d0047ffff00cc00ffc200ff52000aff0070ff3300ff00c2ff007aff
00ffa3ff990000ff0aff70008fff005200ffa3ff00ffeb0008b8aa8500ff00ff5cb800ffff001f00b8ff00d6ffff0070
5cff0000e0ff70e0ff46b8a0a300ff9900ff47ff00ff00a3ffcc00ff008f00ffeb85ff00ff00ebf500ffff007afff500
0abed4d6ff0000ccff1400ffffff000099ff0029ff00ffcc2900ff29ff00ad00ff00f5ff4700ff7a00ff00ffb8005cff
b8ff000085ffffd60019c2c266ff005c00ff"""
_VOC2012 = """background, aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow,
diningtable, dog, horse, motorbike, person, pottedplant, sheep, sofa, train, tvmonitor"""
# Of Cityscapes: the number in *_labelIds.png, name, and the colour of its own viewer.
_CITYSCAPES: tuple[tuple[int, str, tuple[int, int, int]], ...] = (
    (7, "road", (128, 64, 128)),
    (8, "sidewalk", (244, 35, 232)),
    (11, "building", (70, 70, 70)),
    (12, "wall", (102, 102, 156)),
    (13, "fence", (190, 153, 153)),
    (17, "pole", (153, 153, 153)),
    (19, "traffic light", (250, 170, 30)),
    (20, "traffic sign", (220, 220, 0)),
    (21, "vegetation", (107, 142, 35)),
    (22, "terrain", (152, 251, 152)),
    (23, "sky", (70, 130, 180)),
    (24, "person", (220, 20, 60)),
    (25, "rider", (255, 0, 0)),
    (26, "car", (0, 0, 142)),
    (27, "truck", (0, 0, 70)),
    (28, "bus", (0, 60, 100)),
    (31, "train", (0, 80, 100)),
    (32, "motorcycle", (0, 0, 230)),
    (33, "bicycle", (119, 11, 32)),
)


def _split(names: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in names.split(","))


def _in_order(names: tuple[str, ...], first: int) -> ClassTable:
    return ClassTable(names, tuple((first + i, i) for i in range(len(names))))


TABLES = {
    "ade20k": _in_order(_split(_ADE20K), first=1),
    "voc2012": _in_order(_split(_VOC2012), first=0),
    "cityscapes": ClassTable(
        tuple(name for _, name, _ in _CITYSCAPES),
        tuple((number, i) for i, (number, _, _) in enumerate(_CITYSCAPES)),
    ),
}


def class_table(name: str) -> ClassTable:
    """The classes that ``name`` stands for: one of :data:`TABLES`, or a text file with a class a
    line, whose numbers in masks are 0, 1, ... in this order.

    Raises:
      UserError: for a file that cannot be read, or one with no class, with one twice, or with more
        than 255.
    """
    if name in TABLES:
        return TABLES[name]
    try:
        lines = pathlib.Path(name).read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        known = ", ".join(TABLES)
        raise UserError(
            f"classes = {name!r}: neither {known} nor a file with a class a line ({error})"
        ) from error
    names = tuple(line.strip() for line in lines if line.strip())
    if not 1 < len(names) <= IGNORE:
        raise UserError(f"{name}: holds {len(names)} classes, must be 2 to {IGNORE}")
    if len(set(names)) < len(names):
        twice = next(one for one in names if names.count(one) > 1)
        raise UserError(f"{name}: the class {twice!r} is there twice")
    return _in_order(names, first=0)


def palette(table: ClassTable) -> np.ndarray:
    """(256, 3) uint8: a colour a class; black for what is none. Where a data set has no colours
    of its own, those of Pascal VOC, whose class 0 is black too."""
    colours = np.zeros((256, 3), np.uint8)
    if table is TABLES["cityscapes"]:
        colours[: len(_CITYSCAPES)] = [colour for *_, colour in _CITYSCAPES]
        return colours
    if table is TABLES["ade20k"]:
        own = np.frombuffer(bytes.fromhex(_ADE20K_COLOURS), np.uint8).reshape(-1, 3)
        colours[: len(own)] = own
        return colours
    number = np.arange(256)
    for bit in range(8):  # each colour's bits are every third one of the number, highest first
        for channel in range(3):
            ones = (number >> (3 * bit + channel)) & 1
            colours[:, channel] |= (ones << (7 - bit)).astype(np.uint8)
    colours[IGNORE] = 0
    return colours
