"""Questions about the mini-web corpus: their answers are true, and nothing asked in the test was
seen in training. The PDF library is a stub; no package is fetched."""

import io
import types

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image, ImageDraw
from scipy import ndimage

from tests.data.conversions import read_shards
from webssl_jax.config import UserError
from webssl_jax.corpus import mini_questions, printed
from webssl_jax.data import annotations, records
from webssl_jax.evaluators import tables
from webssl_jax.evaluators.vqa import evaluation
from webssl_jax.tools import mini_questions as tool

RED, GREEN, BLUE = (220, 30, 30, 255), (40, 180, 60, 255), (40, 60, 220, 255)
# {topic: (source, caption, colour) of its pictures}
SHOWN = {
    "animals": [
        ("emoji-fluent3d", "dog face", RED),
        ("emoji-fluent3d", "owl", RED),
        ("pysiogame", "trout", RED),
    ],
    "food": [("emoji-fluent3d", "lemon", GREEN), ("tuxpaint", "An onion.", GREEN)],
    "vehicles": [("emoji-fluent3d", "ferry", BLUE), ("emoji-twitter", "oncoming bus", BLUE)],
    "tools": [("emoji-google", name, BLUE) for name in ("axe", "hammer", "shovel", "clamp")],
}


def disc(colour, side=64):
    """On transparent ground."""
    image = Image.new("RGBA", (side, side))
    ImageDraw.Draw(image).ellipse((2, 2, side - 3, side - 3), fill=colour)
    return image


def encoded(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """The probe of a corpus, three pictures of each name on both sides."""
    folder = tmp_path_factory.mktemp("corpus")
    for split in mini_questions.SPLITS:
        shard = folder / records.shard_name(f"probe-{split}", 0, 1)
        writer = ArrayRecordWriter(str(shard), records.WRITER_OPTIONS)
        for topic, pictures in SHOWN.items():
            for source, caption, colour in pictures:
                for i in range(3):
                    key, data = f"{source}/{split}/{caption}/{i}", encoded(disc(colour))
                    record = records.Record(data, (caption,), key, 64, 64, source, topic)
                    writer.write(records.encode(record))
        writer.close()
    return folder


class Page:
    """A line of text, 10 points a letter; ink only where letters are."""

    text = "some (words) stand here, and others here again."

    def get_textpage(self):
        return self

    def get_text_range(self):
        return self.text

    def get_charbox(self, i):
        return 100 + 10 * i, 200, 110 + 10 * i, 212

    def get_text_bounded(self, left, bottom, right, top):
        return self.text[round((left - 100) / 10) : round((right - 100) / 10)]

    def get_size(self):
        return 800, 400

    def render(self, scale, crop):
        left, bottom, right, top = crop
        image = Image.new("L", (800, 400), 255)
        for i, letter in enumerate(self.text):
            grey = ord(letter) if letter.isalpha() else 255
            ImageDraw.Draw(image).rectangle((100 + 10 * i, 188, 109 + 10 * i, 200), grey)
        cut = image.crop((round(left), round(top), round(800 - right), round(400 - bottom)))
        return types.SimpleNamespace(to_pil=lambda: cut)


@pytest.fixture(scope="module")
def manuals():
    """The tree of 40 manuals of three pages."""

    class Document(list):
        def close(self):
            pass

    library = types.SimpleNamespace(
        PdfDocument=lambda data: Document([Page()] * 3), PdfiumError=RuntimeError
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(printed.readers, "load_pdfium", lambda tree: library)
        yield {f"usr/m{i}.pdf": b"" for i in range(40)}


@pytest.fixture(scope="module")
def made(tmp_path_factory, corpus, manuals):
    """(folder, what was written there)."""
    folder = tmp_path_factory.mktemp("made")
    return folder, mini_questions.make(folder, corpus, manuals, 48, 6, 0)


def test_the_same_seed_gives_the_same_and_nothing_of_the_test_is_in_training(
    made, tmp_path, corpus, manuals
):
    for seed in (0, 1):
        (tmp_path / str(seed)).mkdir()
        mini_questions.make(tmp_path / str(seed), corpus, manuals, 48, 6, seed)
    for split in mini_questions.SPLITS:
        a, b, c = (read_shards(x, split) for x in (made[0], tmp_path / "0", tmp_path / "1"))
        assert list(a) == list(b) and a == b != c
    train, test = (read_shards(made[0], split) for split in mini_questions.SPLITS)
    assert len(train) == 48
    assert all("/train/" in key or key.startswith("train/") for key in train)
    assert all("/test/" in key or key.startswith("test/") for key in test)
    learnt, asked = ({x.split("/")[2] for x in keys if "/page/" in x} for keys in (train, test))
    assert learnt and asked and not learnt & asked
    for record in train.values():
        turns = [turn["value"] for turn in annotations.conversations(record)]
        assert turns[0].startswith("<image>\n") and "<image>" not in "".join(turns[1:])
        assert len(turns) in (2, 4)


def test_what_is_asked_is_true_of_all_types_and_as_even_as_it_can_be(made):
    folder, written = made
    kinds = {"dog face": "mammal", "owl": "bird", "trout": "fish", "lemon": "fruit"}
    kinds |= {"An onion.": "vegetable", "ferry": "water", "oncoming bus": "roads"}
    colours = {
        name: {RED: "red", GREEN: "green", BLUE: "blue"}[x]
        for _, name, x in sum(SHOWN.values(), [])
    }
    topics = {name: topic for topic, shown in SHOWN.items() for _, name, _ in shown}
    seen = set()
    for key, record in read_shards(folder, "test").items():
        for one in annotations.questions(record):
            (answer,), kind, name = one["answers"], one["type"], key.split("/")[-2]
            seen.add(kind)
            assert one["category"] == mini_questions.TYPES[kind][0] and 0 < one["chance"] <= 1
            if kind in ("animals", "food", "vehicles"):
                assert kinds[name] == answer and answer in one["question"]
            elif kind in ("topic", "colour"):
                assert {"topic": topics, "colour": colours}[kind][name] == answer
            elif kind == "name":
                assert answer in name.lower() and one["question"].count(answer) == 1
            elif kind == "word":
                assert answer in Page.text
    assert seen == set(mini_questions.TYPES)
    counts = {x: sum(one.type == x for i in written["test"] for one in i.asked) for x in seen}
    assert set(counts.values()) == {6}
    shares = mini_questions.chances(written["test"])
    guesses = [shares[name] for name in ("animals", "food", "side")]
    assert guesses == pytest.approx([2 / 6, 3 / 6, 2 / 6])  # of three, two and three answers
    offered = [mini_questions.Asked("name", "?", str(i), 4) for i in range(8)]
    item = mini_questions.Item("x", "x", b"", (1, 1), offered)
    assert mini_questions.chances([item]) == {"name": 1 / 4}  # no answer is as frequent


def test_words_of_no_kind_or_two_and_figures_of_two_colours_are_not_asked_about():
    assert mini_questions.kind("animals", "A baby of a gnu.") == "mammal"
    for caption in ("pig nose", "cat and fish", "dragon", "teddy bear"):
        assert mini_questions.kind("animals", caption) is None
    assert mini_questions.kind("tools", "dog") is None
    both = disc(RED)
    both.paste(BLUE, (32, 0), disc(RED).getchannel("A").crop((32, 0, 64, 64)))
    assert mini_questions.colour(both) is None
    assert mini_questions.colour(Image.new("RGB", (8, 8), "red")) is None  # no ground
    names = {(250, 210, 60): "yellow", (240, 130, 20): "orange", (110, 70, 40): "brown"}
    names |= {(20, 20, 20): "black", (140, 140, 145): "grey", (240, 110, 190): "pink"}
    names |= {(140, 60, 210): "purple", (250, 230, 200): None, (30, 200, 200): None}
    for rgb, name in names.items():
        assert mini_questions.colour(disc((*rgb, 255))) == name


def test_pictures_show_what_is_asked_of_them():
    rng = np.random.default_rng(0)
    discs = {"animals": [encoded(disc(RED))], "vehicles": [encoded(disc(BLUE))]}
    discs["food"] = [encoded(disc(GREEN))]
    channel = {"animals": 0, "food": 1, "vehicles": 2}
    for i in range(12):
        item = mini_questions._scene(rng, discs, "x", 1 + i % 4)
        pixels = np.asarray(Image.open(io.BytesIO(item.image)).convert("RGB")).astype(int)
        vivid = np.ptp(pixels, axis=-1) > 120
        count, side = item.asked
        found = {
            topic: ndimage.label(vivid & (pixels.argmax(axis=-1) == at))
            for topic, at in channel.items()
        }
        (asked,) = [topic for topic in found if topic in count.text]
        assert str(found[asked][1]) == count.answer == str(1 + i % 4)
        lefts = {topic: np.where(x)[1].min() for topic, (x, n) in found.items() if n}
        assert min(lefts, key=lefts.get).startswith(side.answer)
    for _ in range(6):
        image, title, bars = printed.chart(rng, 224)
        assert title not in bars and 3 <= len(bars) <= 4
        pixels = np.asarray(image).astype(int)
        step = (224 - 4 - 36) / len(bars)
        for place, height in enumerate(bars.values()):
            column = pixels[:, int(36 + step * (place + 0.5))]
            bar = (column == column[224 - 36 - 3]).all(axis=-1).sum()
            assert bar == pytest.approx(height / 10 * (224 - 5 * 18), abs=3)


def test_a_word_of_a_page_is_in_the_middle_of_its_piece(manuals):
    pieces = list(printed.pieces(manuals, False, 120, np.random.default_rng(0)))
    assert {piece.word for piece in pieces} == {"some", "words", "stand", "here", "others", "again"}
    assert all(not printed.is_test(piece.key.split("/")[0]) for piece in pieces)
    for piece in pieces:
        letters = np.asarray(piece.image)[60, :, 0]
        step = 120 / (1.7 * len(piece.word))
        left = 60 - step * len(piece.word) / 2
        read = [letters[int(left + step * (i + 0.5))] for i in range(len(piece.word))]
        assert np.abs(np.array(read) - [*piece.word.encode()]).max() < 12


def test_a_row_has_the_four_categories_beside_chance_each_with_its_own_error(made):
    data = f"{made[0]}/test-*.arrayrecord"
    row = evaluation.VQA(evaluation.VQAOptions("shards", data))
    asked = list(row._questions())
    right, half = (
        row._outcome([q.answered(q.extra["answers"][0] if says(q) else "?") for q in asked])
        for says in (
            lambda q: q.extra["category"] != "knowledge",
            lambda q: q.extra["type"] == "topic",
        )
    )
    four = [f"accuracy/{name}" for name in ("general", "knowledge", "chart_ocr", "vision_centric")]
    assert right.headline == ("accuracy", *four)
    assert [right.metrics[name] for name in four] == [100, 0, 100, 100]
    assert half.metrics["accuracy/general"] == 50 and half.metrics["accuracy/name"] == 0
    assert half.se("accuracy/general") == pytest.approx(100 * 0.5 / 12**0.5)
    assert right.chance["accuracy/knowledge"] == pytest.approx(100 * (2 / 6 + 3 / 6 + 3 / 6) / 3)
    text = tables.report({"A": {"mini": half}, "B": {"mini": right}})
    assert "mini accuracy/general: B clearly above A: +50.000 ± 14.434" in text
    assert "mini accuracy/knowledge: B not clearly different from A" in text


def test_a_folder_without_a_probe_and_a_damaged_picture_are_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(tool.packages, "download_shown", lambda *a: pytest.fail("fetched"))
    with pytest.raises(UserError, match=r"has no probe-train-\*.arrayrecord; webssl mini_web"):
        tool.main(["--corpus", str(tmp_path), "--output", str(tmp_path / "x")])
    damaged = records.Record(encoded(disc(RED))[:80], ("owl",), "k", 64, 64, "tuxpaint", "animals")
    with pytest.raises(UserError, match="record k: its image cannot be decoded"):
        mini_questions._about(damaged, {"animals": {"owl"}}, np.random.default_rng(0))
