"""Questions with known answers about the mini-web corpus, in the four categories of Cambrian-1.

Nothing is guessed by a network: a topic and a name are those of the package, a kind follows from
the name by a table of words, a colour from the pixels by a rule, and scenes, charts and pieces of
pages are drawn from what is asked. Pictures of the test are those of the corpus' ``probe-test``,
which resemble nothing in ``probe-train``, whose pictures are asked about in training.
"""

from __future__ import annotations

import collections
import io
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from webssl_jax.config import UserError
from webssl_jax.corpus import printed
from webssl_jax.corpus.texts import WORDS
from webssl_jax.data import annotations as annotation
from webssl_jax.data import records, turns
from webssl_jax.data.sources import ArrayRecordSource
from webssl_jax.evaluators.vqa.task import CHART_OCR, GENERAL, KNOWLEDGE, VISION_CENTRIC

SPLITS = ("train", "test")
MANUALS = "latex-manuals"  # the source whose pages are cut
SIDE = 224  # of what is drawn
TURNS = 2  # of a conversation, at most
# {type: (category, what it tells of)}. Of what tells of the same a conversation asks once: else one
# answer helps to guess the other.
TYPES = {
    "topic": (GENERAL, "thing"),
    "name": (GENERAL, "thing"),
    "animals": (KNOWLEDGE, "thing"),
    "food": (KNOWLEDGE, "thing"),
    "vehicles": (KNOWLEDGE, "thing"),
    "word": (CHART_OCR, "word"),
    "title": (CHART_OCR, "title"),
    "highest": (CHART_OCR, "bars"),
    "height": (CHART_OCR, "bars"),
    "colour": (VISION_CENTRIC, "colour"),
    "count": (VISION_CENTRIC, "count"),
    "side": (VISION_CENTRIC, "side"),
}
_OPTIONS = 4
# Topics whose pictures are of one thing that a word names; actions and faces are not.
_NAMED = frozenset(
    "animals buildings clothes electronics food furniture music plants sport tools vehicles".split()
)
_SORTED = ("emoji", "tuxpaint")  # whose pictures lie by topic; others' folders are broader
# Of their names those that a person would sort elsewhere: weather's umbrella, a kitchen knife.
_ELSEWHERE = frozenset("brick diya docks hocho rock snowman umbrella wood".split())
_NAMES_OF = ("emoji", "pysiogame", "tuxpaint", "sweethome3d")  # openclipart's are titles
_NAME = re.compile(r"(?:an? |the )?([a-z]{3,10})(?:\.|, [a-z ]+)?")
# {topic: (question, {kind: words that name one})}; what has no kind, or two, is not asked about.
_KINDS = {
    "animals": (
        "What kind of animal is it: bird, fish, insect or mammal?",
        {
            "bird": "bird blackbird chicken crane crow cuckoo dodo dove duck eagle flamingo fowl "
            "goose gull hen heron hummingbird jay lark lorikeet magpie ostrich owl parakeet parrot "
            "peacock peafowl peahen pelican penguin pigeon puffin quetzal rhea rooster seagull "
            "shrike sparrow swan toucan turkey vulture",
            "fish": "blowfish butterflyfish clownfish dolphinfish fish gourami greyling groper "
            "lionfish loach piranha seahorse shark trout wrasse",
            "insect": "ant bee beetle butterfly cockroach cricket dragonfly fly grasshopper "
            "honeybee hornet hoverfly ladybug mantis mosquito wasp",
            "mammal": "antelope armadillo baboon badger bat beagle bear beaver bison boar buffalo "
            "bull bulldog bunny camel capybara caribou cat chimp chimpanzee chipmunk cow deer "
            "dingo doe dog dolphin donkey dromedary elephant elk fawn ferret fox giraffe gnu goat "
            "gorilla hamster hedgehog hippopotamus horse hyena jaguar kangaroo kitten koala lamb "
            "lemur leopard lion llama mammoth marmot mole monkey moose mouse opossum orangutan "
            "orca otter ox panda panther pig pony poodle pug puppy rabbit raccoon ram rat rhino "
            "rhinoceros seal sheep skunk sloth squirrel tamarin tiger whale wolf wombat yak zebra",
        },
    ),
    "food": (
        "What kind of food is it: drink, fruit, meat, sweets or vegetable?",
        {
            "drink": "beer beverage cocktail coffee drink juice lemonade milk sake softdrink tea "
            "wine",
            "fruit": "apple apricot banana blueberries blueberry cherries cherry grapefruit grapes "
            "kiwi kiwifruit lemon lime mandarin mango melon orange papaya peach pear pineapple "
            "plums prune raspberry strawberry tangerine watermelon",
            "meat": "bacon beef ham meat poultry sausage steak",
            "sweets": "cake candy chocolate cookie cupcake custard doughnut flan fudge lollipop "
            "marshmallow muffin pudding shortcake",
            "vegetable": "artichokes asparagus broccoli cabbage carrot cauliflower celery garlic "
            "leek lettuce onion potato potatoes radish spinach turnip yam",
        },
    ),
    "vehicles": (
        "Where does it travel: air, rails, roads or water?",
        {
            "air": "aircraft airplane balloon helicopter jet plane rocket",
            "rails": "boxcar caboose locomotive metro monorail train",
            "roads": "ambulance automobile bicycle bus lorry minibus motorcycle rickshaw sedan suv "
            "taxi tricycle trolleybus truck van",
            "water": "boat canoe ferry sailboat schooner ship speedboat trawler tugboat",
        },
    ),
}
_NO_KIND = frozenset(  # parts, toys and signs; foods of several kinds
    "aerial bottle cherimoya corks hitch knot nose pie roadsigns route sign stop teddy toy "
    "track".split()
)
_KIND_OF = {
    topic: {word: kind for kind, words in kinds.items() for word in words.split()}
    for topic, (_, kinds) in _KINDS.items()
}
_FIGURES = "emoji-fluent3d"  # cut-outs of 256 pixels
_THINGS = {"animals": "animal", "food": "food", "vehicles": "vehicle"}  # {topic: as an answer}
_COUNTED = ("animals", "vehicles")  # of food several often make one figure
_SIDE_ASKED = "What is farthest to the left: animal, food or vehicle?"
_CELLS = 3  # of a scene, a side
# Upper ends of hues in degrees; between colours that people would not agree on lies no name.
_HUES = (
    *((12, "red"), (41, ""), (66, "yellow"), (80, ""), (160, "green")),
    *((195, ""), (240, "blue"), (260, ""), (292, "purple"), (305, ""), (342, "pink"), (350, "")),
    (361, "red"),
)
_MOSTLY = 0.6  # share of a figure's pixels that have the colour it is named by


class Asked(NamedTuple):
    """A question of a type, its answer, and how many answers it offers (0: none)."""

    type: str
    text: str
    answer: str
    options: int = 0


class Item(NamedTuple):
    """An encoded image with what may be asked about it, or is."""

    key: str
    source: str
    image: bytes
    size: tuple[int, int]
    asked: Sequence[Asked]


def make(
    output: Path, corpus: Path, tree: Mapping[str, bytes], train: int, test: int, seed: int
) -> dict[str, list[Item]]:
    """Writes ``train-*`` (conversations) and ``test-*`` (questions) into ``output``, a folder that
    exists, and returns {"train", "test": what is in them, in their order}.

    Args:
      corpus: the folder of tools/mini_web.py. tree: the files of its source latex-manuals.
      train: conversations: half of them about pictures of the corpus, a sixth each about scenes,
        charts and pieces of pages; fewer where there is no more material.
      test: questions of each type, at most; among them the answers are as even as they can be.

    Raises:
      UserError: if the corpus has no probe, or a shard cannot be read.
    """
    check(corpus)
    made = {}
    for part, split in enumerate(SPLITS):
        rng = np.random.default_rng([seed, part])
        pictures = _read(corpus, split)
        names, figures = _names(pictures), _figures(pictures)
        items = [item for one in pictures if (item := _about(one, names, rng)).asked]
        items = [items[i] for i in rng.permutation(len(items))]
        each = train // 6
        if split == "train":
            del items[train - 3 * each :]
        else:
            each = 2 * test  # to choose from
        items += [_scene(rng, figures, f"{split}/scene/{i}", 1 + i % 4) for i in range(each)]
        items += [_chart(rng, f"{split}/chart/{i}") for i in range(each)]
        pieces = printed.pieces(tree, split == "test", SIDE, rng)
        items += _words(rng, list(itertools.islice(pieces, each)), f"{split}/page")
        items = _chosen(items, test, rng) if split == "test" else items
        # shuffled: the first of them, if not all are asked, are of all categories
        made[split] = [items[i] for i in rng.permutation(len(items))]
        _write(output, split, made[split], rng)
    return made


def chances(items: Sequence[Item]) -> dict[str, float]:
    """{type: the share that is right without a look: by chance among the offered answers, or by the
    most frequent answer, whichever is more}."""
    asked: dict[str, list[Asked]] = {name: [] for name in TYPES}
    for one in (one for item in items for one in item.asked):
        asked[one.type].append(one)
    found = {}
    for name, those in ((name, those) for name, those in asked.items() if those):
        most = collections.Counter(one.answer for one in those).most_common(1)[0][1]
        offered = sum(1 / one.options for one in those if one.options)
        found[name] = max(most, offered) / len(those)
    return found


def kind(topic: str | None, caption: str) -> str | None:
    """``mammal`` of ("animals", "dog face"); None for words of no kind, or of two."""
    words = set(re.findall("[a-z]+", caption.lower()))
    found = {_KIND_OF.get(topic or "", {}).get(word) for word in words} - {None}
    return found.pop() if len(found) == 1 and not words & _NO_KIND else None


def colour(image: Image.Image) -> str | None:
    """The colour of most of a cut-out figure; None where no name has enough of it, or the image has
    no transparent ground."""
    rgba = np.asarray(image.convert("RGBA"), np.float32) / 255
    figure = rgba[rgba[..., 3] > 0.5][:, :3]
    if not 0.1 < len(figure) / rgba[..., 3].size < 0.97:
        return None
    value, low = figure.max(axis=1), figure.min(axis=1)
    saturation = (value - low) / np.maximum(value, 1e-6)
    pixels = (figure * 255).astype(np.uint8)[None]
    hue = np.asarray(Image.fromarray(pixels).convert("HSV"))[0, :, 0] * (360 / 256)
    ends, names = zip(*_HUES)
    vivid = (saturation > 0.45) & (value > 0.45)
    shares = {
        name: (vivid & (np.array(names)[np.digitize(hue, ends)] == name)).mean()
        for name in sorted(set(names) - {""})
    }
    orange = (hue > 18) & (hue < 36) & (saturation > 0.6) & (value > 0.8)
    brown = (hue > 8) & (hue < 42) & (saturation > 0.35) & (value > 0.2) & (value < 0.72)
    shares |= {"orange": orange.mean(), "brown": brown.mean()}
    shares["red"] -= (vivid & ((hue < 12) | (hue >= 350)) & (saturation < 0.6)).mean()  # terracotta
    shares["black"] = (value < 0.2).mean()
    shares["grey"] = ((saturation < 0.1) & (value > 0.4) & (value < 0.7)).mean()
    best = max(shares, key=lambda name: shares[name])
    return best if shares[best] >= _MOSTLY else None


def check(corpus: Path) -> None:
    """Whether a folder holds the probe of mini-web.

    Raises:
      UserError: if it does not.
    """
    for split in SPLITS:
        shards = f"probe-{split}-*.arrayrecord"
        if not list(corpus.glob(shards)):
            raise UserError(f"--corpus {corpus}: has no {shards}; webssl mini_web makes it")


def _read(corpus: Path, split: str) -> list[records.Record]:
    shards = corpus / f"probe-{split}-*.arrayrecord"
    source = ArrayRecordSource(str(shards))
    try:
        return [records.decode(source[place]) for place in range(len(source))]
    except records.RecordError as error:
        raise UserError(f"{shards}: {error}") from error


def _name(record: records.Record) -> str | None:
    if record.label not in _NAMED or not record.source.startswith(_NAMES_OF):
        return None
    found = _NAME.fullmatch(record.captions[0].lower()) if record.captions else None
    return found.group(1) if found else None


def _names(pictures: Sequence[records.Record]) -> dict[str, set[str]]:
    """{topic: the names of its pictures}."""
    found: dict[str, set[str]] = collections.defaultdict(set)
    for one in pictures:
        if (name := _name(one)) and one.label:
            found[one.label].add(name)
    return found


def _figures(pictures: Sequence[records.Record]) -> dict[str, list[bytes]]:
    """{topic: cut-outs of one thing}, for scenes."""
    found: dict[str, list[bytes]] = {topic: [] for topic in _THINGS}
    for one in pictures:
        if one.source == _FIGURES and one.label in found and kind(one.label, one.captions[0]):
            found[one.label].append(one.image)
    if not all(found.values()):
        raise UserError(f"--corpus: its probe lacks {_FIGURES}, of which scenes are composed")
    return found


def _about(record: records.Record, names: dict[str, set[str]], rng: np.random.Generator) -> Item:
    topic, caption = record.label or "", " ".join(record.captions[:1])
    asked = []
    if record.source.startswith(_SORTED) and not _ELSEWHERE & set(caption.lower().split()):
        asked.append(Asked("topic", "What is the topic of the picture?", topic))
    if name := _name(record):
        # of other topics: a dog is also a pet, but no tool
        others = sorted(set().union(*names.values()) - names[topic])
        if len(others) >= _OPTIONS:
            asked.append(_choice(rng, "name", "What is shown", name, others))
    if found := kind(topic, caption):
        asked.append(Asked(topic, _KINDS[topic][0], found, len(_KINDS[topic][1])))
    try:
        named = colour(Image.open(io.BytesIO(record.image)))
    except (OSError, SyntaxError) as error:  # Pillow has both for damaged files
        raise UserError(f"record {record.key}: its image cannot be decoded ({error})") from error
    if named:
        asked.append(Asked("colour", "Which colour is most of it?", named))
    return Item(record.key, record.source, record.image, (record.width, record.height), asked)


def _choice(
    rng: np.random.Generator, name: str, text: str, answer: str, others: Sequence[str]
) -> Asked:
    """Offers the answer among others, in an order drawn by chance."""
    picked = rng.choice([x for x in others if x != answer], _OPTIONS - 1, replace=False)
    options = [str(x) for x in rng.permutation([answer, *picked])]
    return Asked(name, f"{text}: {_listed(options)}?", answer, _OPTIONS)


def _scene(
    rng: np.random.Generator, figures: Mapping[str, Sequence[bytes]], key: str, count: int
) -> Item:
    """Figures on plain ground, none over another: ``count`` of a topic, which are counted, and some
    of the others. The one farthest to the left is farther by a tenth of the side, or those beside
    it are of its topic."""
    counted = _COUNTED[int(rng.integers(len(_COUNTED)))]
    second, third = int(rng.integers(1, 3)), int(rng.integers(0, 2))
    others = [str(x) for x in rng.permutation([x for x in _THINGS if x != counted])]
    shown = [counted] * count + [others[0]] * second + [others[1]] * third
    cell = SIDE // _CELLS
    while True:
        sizes = rng.integers(int(0.7 * cell), int(0.9 * cell), len(shown))
        cells = rng.permutation(_CELLS**2)[: len(shown)]
        corners = np.stack(np.divmod(cells, _CELLS), axis=1) * cell
        corners += (rng.uniform(0, 1, corners.shape) * (cell - sizes[:, None])).astype(int)
        middles = corners[:, 0] + sizes / 2
        first = shown[int(middles.argmin())]
        rest = [x for x, topic in zip(middles, shown) if topic != first]
        if min(rest) - middles.min() >= SIDE / 10:
            break
    ground = np.array([*rng.integers(170, 256, 3), 255])
    image = Image.new("RGBA", (SIDE, SIDE), tuple(ground.tolist()))
    for topic, size, corner in zip(shown, sizes.tolist(), corners.tolist()):
        data = figures[topic][int(rng.integers(len(figures[topic])))]
        figure = Image.open(io.BytesIO(data)).convert("RGBA").resize((size, size))
        image.alpha_composite(figure, tuple(corner))
    asked = (
        Asked("count", f"How many {counted} are there?", str(count)),
        Asked("side", _SIDE_ASKED, _THINGS[first], len(_THINGS)),
    )
    return _drawn(key, image, asked)


def _chart(rng: np.random.Generator, key: str) -> Item:
    image, title, bars = printed.chart(rng, SIDE)
    label = sorted(bars)[int(rng.integers(len(bars)))]
    highest = max(bars, key=lambda name: bars[name])
    asked = (
        _choice(rng, "title", "What is the title of the chart", title, WORDS),
        Asked("highest", f"Which bar is the highest: {_listed(list(bars))}?", highest, len(bars)),
        Asked("height", f"How high is the bar {label}?", str(bars[label])),
    )
    return _drawn(key, image, asked)


def _words(rng: np.random.Generator, pieces: Sequence[printed.Piece], split: str) -> Iterator[Item]:
    """Each with words of other pieces as the other answers, if possible as long as its own."""
    known = sorted({piece.word for piece in pieces})
    for number, piece in enumerate(pieces):
        words = [word for word in known if word != piece.word]
        alike = [word for word in words if len(word) == len(piece.word)]
        others = alike if len(alike) >= _OPTIONS else words
        asked = _choice(rng, "word", "Which word is in the middle", piece.word, others)
        yield _drawn(f"{split}/{piece.key}/{number}", piece.image, (asked,))


def _listed(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}"


def _drawn(key: str, image: Image.Image, asked: Sequence[Asked]) -> Item:
    file = io.BytesIO()
    image.convert("RGB").save(file, "PNG")
    return Item(key, "mini_questions", file.getvalue(), image.size, asked)


def _chosen(items: Sequence[Item], each: int, rng: np.random.Generator) -> list[Item]:
    """At most ``each`` questions of a type, one answer after the other; items without one go."""
    queues: dict[str, dict[str, list[int]]] = {name: {} for name in TYPES}
    for place in rng.permutation(len(items)).tolist():
        for one in items[place].asked:
            queues[one.type].setdefault(one.answer, []).append(place)
    kept: dict[int, set[str]] = collections.defaultdict(set)
    for name, by_answer in queues.items():
        turns = itertools.zip_longest(*by_answer.values())
        order = [place for turn in turns for place in turn if place is not None]
        for place in order[:each]:
            kept[place].add(name)
    return [
        items[place]._replace(asked=[one for one in items[place].asked if one.type in kept[place]])
        for place in sorted(kept)
    ]


def _write(output: Path, split: str, items: Sequence[Item], rng: np.random.Generator) -> None:
    chance = chances(items)
    place = output / records.shard_name(split, 0, 1)
    writer = ArrayRecordWriter(str(place), records.WRITER_OPTIONS)
    for item in items:
        found: dict[str, Any]
        if split == "train":
            found = {"conversations": _conversation(item, rng)}
        else:
            found = {"questions": [_question(one, chance) for one in item.asked]}
        notes = {name: annotation.encode_json(x) for name, x in found.items()}
        record = records.Record(
            item.image, (), item.key, *item.size, item.source, annotations=notes
        )
        writer.write(records.encode(record))
    writer.close()


def _question(one: Asked, chance: Mapping[str, float]) -> dict[str, Any]:
    category = TYPES[one.type][0]
    said = {"question": one.text, "answers": [one.answer], "category": category}
    return said | {"type": one.type, "chance": chance[one.type]}


def _conversation(item: Item, rng: np.random.Generator) -> list[dict[str, str]]:
    told: dict[str, Asked] = {}
    for i in rng.permutation(len(item.asked)):
        told.setdefault(TYPES[item.asked[i].type][1], item.asked[i])
    return turns.written((one.text, one.answer) for one in list(told.values())[:TURNS])
