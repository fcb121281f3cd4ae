"""Zero-shot classification: open_clip's arithmetic written down again in torch, its templates, and
what a person may get wrong."""

import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from tests.evaluators.small_models import (
    BATCH,
    broken,
    coloured,
    items_of,
    labelled_shard,
    shard,
    small_clip,
)
from webssl_jax.config import UserError
from webssl_jax.data.tokens import Tokenizer
from webssl_jax.evaluators import datasets
from webssl_jax.evaluators.features import Cache
from webssl_jax.evaluators.texts import zero_shot
from webssl_jax.evaluators.texts.zero_shot import ZeroShot
from webssl_jax.model import in_batches


def slow_classifier(table, names, templates):
    """As open_clip builds it, class by class: (E, classes)."""
    columns = []
    for name in names:
        each = torch.stack([table[template.format(name)] for template in templates])
        mean = torch.nn.functional.normalize(each, dim=-1).mean(dim=0)
        columns.append(mean / mean.norm())
    return torch.stack(columns, dim=1)


def lines(folder, text, name="own.txt"):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def test_figures_equal_those_of_open_clips_formula(tmp_path):
    model, rng = small_clip(), np.random.default_rng(0)
    labels = [f"n{i}" for i in rng.integers(0, 6, 50)]
    names, templates = ("cat", "a {brace}", "dog", "Ünïcode", "rat", "hen"), ("{}", "an old {}.")
    images = coloured(50)[0]
    pattern = shard(tmp_path, "test", items_of(images, labels))
    given = ZeroShot.Options(
        pattern,
        lines(tmp_path, "{}\nan old {}.\n", "templates.txt"),
        lines(tmp_path, "\n".join(names), "names.txt"),
    )
    made = ZeroShot(given).run(model, Cache(tmp_path / "c", BATCH, 2))

    texts = [template.format(name) for name in names for template in templates]
    tokens = Tokenizer(77)(texts)
    embedded = [np.array(model.text.embed(x))[:n] for x, n in in_batches(tokens, 16)]
    table = dict(zip(texts, torch.tensor(np.concatenate(embedded))))
    view = np.stack([model.preprocess(Image.fromarray(image)) for image in images])
    seen = [np.array(model.text.embed_images(x))[:n] for x, n in in_batches(view, BATCH)]
    logits = 100 * torch.tensor(np.concatenate(seen)) @ slow_classifier(table, names, templates)
    truth = torch.tensor([int(label[1:]) for label in labels])
    best = logits.topk(5, dim=1).indices == truth[:, None]
    np.testing.assert_array_equal(made.items["top1"], best[:, 0])
    np.testing.assert_array_equal(made.items["top5"], best.any(dim=1))
    assert made.metrics["top1"] == pytest.approx(best[:, 0].float().mean().item())
    assert made.metrics["top5"] == pytest.approx(best.any(dim=1).float().mean().item())
    assert 0 < made.metrics["top1"] < made.metrics["top5"] < 1
    assert made.chance == {"top1": 1 / 6, "top5": 5 / 6} and made.headline == ("top1", "top5")
    assert "50 test images" in made.meaning and "6 classes" in made.meaning

    words = broken(model).params["text"]
    half = type(model)(model.networks, model.params | {"text": words}, model.origin)
    with pytest.raises(UserError, match="NaN or infinity in the embeddings of texts"):
        ZeroShot(given).run(half, Cache(tmp_path / "c", BATCH, 2))


def test_names_of_a_file_may_say_more_classes_than_the_images_have(tmp_path):
    pattern = labelled_shard(tmp_path, "own", 24)  # of ant, bee and cat
    cache = Cache(tmp_path / "c", BATCH, 2)

    def run(text):
        return ZeroShot(ZeroShot.Options(pattern, "short", lines(tmp_path, text))).run(
            small_clip(), cache
        )

    made = run("emu\ta large bird\nant\tan ant\nbee\ta bee\ncat\ta cat\n")
    assert made.chance["top1"] == 1 / 4 and "7 templates" in made.meaning


def test_names_that_do_not_fit_the_labels_are_refused_when_the_row_is_made(tmp_path, monkeypatch):
    pattern = labelled_shard(tmp_path, "own", 24)  # of ant, bee and cat

    def make(text):
        return ZeroShot(ZeroShot.Options(pattern, "short", lines(tmp_path, text)))

    for checked in (4096, 12):  # all of them; some
        monkeypatch.setattr(zero_shot, "_CHECKED", checked)
        with pytest.raises(UserError, match="2 class names, but the records have 3 labels .ant"):
            make("a cat\na dog\n")
        with pytest.raises(UserError, match="label 'cat' is none of the 2 known classes"):
            make("ant\tan ant\nbee\ta bee\n")
    assert make("a\nb\nc\nd\n")  # of records that were not read there may be a fourth
    monkeypatch.setattr(zero_shot, "_CHECKED", 4096)
    with pytest.raises(UserError, match="4 class names, but the records have 3"):
        make("a\nb\nc\nd\n")


def test_changed_words_in_the_same_file_are_not_taken_for_the_same(tmp_path):
    pattern, data = labelled_shard(tmp_path, "own", 6), set()
    for templates in ("{}", "a {}"):
        for names in ("an ant\na bee\na cat", "ants\nbees\ncats"):
            files = [lines(tmp_path, templates, "t.txt"), lines(tmp_path, names, "n.txt")]
            data.add(ZeroShot(ZeroShot.Options(pattern, *files)).data)
    assert len(data) == 4


def test_of_equal_scores_the_first_class_wins():
    scores, labels = np.array([[1.0, 1, 0], [1, 1, 0], [0, 0, 0]]), np.array([0, 1, 2])
    assert zero_shot.ranks(scores, labels).tolist() == [0, 1, 2]


def test_opposite_embeddings_leave_a_class_without_direction():
    texts = np.array([[1, 0], [-1, 0], [0, 1], [0, 1]], np.float32)
    assert zero_shot.classifier(texts, 2).tolist() == [[0, 0], [0, 1]]


def test_the_lists_are_openais():
    """The sums are of open_clip 3.3.0's lists, joined by line ends."""
    everything, short = (zero_shot.read_templates(name) for name in zero_shot.LISTS)
    assert len(everything) == len(set(everything)) == 80 and len(short) == 7
    assert everything[0] == "a bad photo of a {}." and everything[-1] == "a tattoo of the {}."
    assert short[0] == "itap of a {}." and set(short) <= set(everything)
    assert all(template.count("{}") == 1 for template in everything)
    sums = [zlib.crc32("\n".join(names).encode()) for names in (everything, short)]
    assert sums == [3066435271, 84805687]


def test_own_templates_and_names_are_read_from_files(tmp_path):
    assert zero_shot.read_templates(lines(tmp_path, "\ufeffa {}\r\n\r\n {} or {}")) == (
        "a {}",
        "{} or {}",
    )
    assert zero_shot.prompts(["x", "{}"], ["{} or {}"]) == ["x or x", "{} or {}"]
    given = zero_shot.read_class_names(lines(tmp_path, "tabby cat\n\ndog\n"))
    assert given.labels is None and given.of(("n1", "n2")) == ("tabby cat", "dog")
    given = zero_shot.read_class_names(lines(tmp_path, "n2\tdog\nn1\ttabby cat\nn3\then"))
    assert given.labels == ("n2", "n1", "n3") and given.of(("n1", "n2")) == ("tabby cat", "dog")


@pytest.mark.parametrize(
    "read, text, says",
    [
        ("read_templates", "a {}\nno place", r"own.txt, line 2: 'no place' has no \{\} for"),
        ("read_templates", "\n \n", "own.txt: is empty; give templates, one a line"),
        ("read_templates", b"\xff\xfe", "own.txt: no templates can be read .is not UTF-8"),
        ("read_class_names", "", "own.txt: is empty; give class names, one a line"),
        ("read_class_names", "cat\nn1\tdog", "own.txt, line 2: every line must be a name, or"),
        ("read_class_names", "n1\t\nn2\tdog", "own.txt, line 1: every line must be a name, or"),
        ("read_class_names", "n1\ta\nn2\tb\nn1\tc", "own.txt: the label 'n1' comes 2 times"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path, read, text, says):
    with pytest.raises(UserError, match=says):
        getattr(zero_shot, read)(lines(tmp_path, text))


def test_names_that_do_not_fit_the_labels_and_lists_that_do_not_exist_are_one_line(tmp_path):
    with pytest.raises(UserError, match="names.txt: 1 class names, but the records have 2 labels"):
        zero_shot.ClassNames("names.txt", ("cat",), None).of(("n1", "n2"))
    with pytest.raises(UserError, match="names.txt: no name for the label 'n2'"):
        zero_shot.ClassNames("names.txt", ("cat",), ("n1",)).of(("n1", "n2"))
    with pytest.raises(UserError, match="no list of that name; did you mean 'imagenet'"):
        zero_shot.read_templates("imagnet")
    with pytest.raises(UserError, match="nowhere.txt: no class names can be read .No such file"):
        zero_shot.read_class_names("/nowhere.txt")
    with pytest.raises(UserError, match="no templates can be read .Is a directory"):
        zero_shot.read_templates(str(tmp_path))


def test_the_tenth_name_is_that_of_label_10_and_names_in_doubtful_order_need_their_labels():
    labels = datasets.in_order({str(n) for n in range(12)})
    names = tuple(f"name of class {n}" for n in range(12))
    given = zero_shot.ClassNames("names.txt", names, None)
    assert dict(zip(labels, given.of(labels)))["10"] == "name of class 10"
    with pytest.raises(UserError, match="the label 'c11' comes before 'c2', by their numbers it"):
        given.of(datasets.in_order({f"c{n}" for n in range(12)}))
    assert given.of(datasets.in_order({f"c{n:02d}" for n in range(12)})) == names
