"""Zero-shot classification: open_clip's arithmetic written down again in torch, its templates, and
what a person may get wrong."""

import zlib

import numpy as np
import pytest
import torch

from tests.evaluators.small_clip import BATCH, MESH, small_clip
from webssl_jax.config import UserError
from webssl_jax.data.tokens import Tokenizer
from webssl_jax.evaluators import towers, zero_shot
from webssl_jax.evaluators.base import Dataset


def slow_classifier(table, names, templates):
    """As open_clip builds it, class by class: (E, classes)."""
    columns = []
    for name in names:
        each = torch.stack([table[template.format(name)] for template in templates])
        mean = torch.nn.functional.normalize(each, dim=-1).mean(dim=0)
        columns.append(mean / mean.norm())
    return torch.stack(columns, dim=1)


def test_figures_equal_those_of_open_clips_formula():
    method, variables = small_clip()
    bound = towers.tower_functions(method, MESH, BATCH)(variables)
    names, templates = ("cat", "a {brace}", "dog", "Ünïcode", "rat", "hen"), ("{}", "an old {}.")
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (50, 16, 16, 3), dtype=np.uint8)
    test = Dataset(images, rng.integers(0, 6, 50).astype(np.int32), names)
    tokens = towers.tokenize(method, zero_shot.prompts(names, templates))
    found = zero_shot.ZeroShotEvaluation(test, names, templates, tokens).measure(bound)

    texts = [template.format(name) for name in names for template in templates]
    embedded = method.embed_texts(variables.params, Tokenizer(77)(texts))
    table = dict(zip(texts, torch.tensor(np.asarray(embedded))))
    features = torch.tensor(np.asarray(method.embed_images(variables.params, images)))
    logits = 100 * features @ slow_classifier(table, names, templates)
    best = logits.topk(5, dim=1).indices == torch.tensor(test.labels)[:, None]
    made = found.metrics()
    assert made["eval/zero_shot/top1"] == pytest.approx(best[:, 0].float().mean().item())
    assert made["eval/zero_shot/top5"] == pytest.approx(best.any(dim=1).float().mean().item())
    assert 0 < made["eval/zero_shot/top1"] < made["eval/zero_shot/top5"] < 1
    assert found.chance == {"eval/zero_shot/top1": 1 / 6, "eval/zero_shot/top5": 5 / 6}
    assert zero_shot.ZeroShot.from_json(found.to_json()).metrics() == made

    broken = bound._replace(texts=lambda rows: bound.texts(rows) * np.nan)
    with pytest.raises(UserError, match="zero-shot classification: NaN or infinity"):
        zero_shot.ZeroShotEvaluation(test, names, templates, tokens).measure(broken)


def test_of_equal_scores_the_first_class_wins():
    scores, labels = np.array([[1.0, 1, 0], [1, 1, 0], [0, 0, 0]]), np.array([0, 1, 2])
    assert zero_shot.ranks(scores, labels).behind.tolist() == [0, 1, 2]


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
    def file(text):
        path = tmp_path / "own.txt"
        path.write_bytes(text.encode())
        return str(path)

    assert zero_shot.read_templates(file("\ufeffa {}\r\n\r\n {} or {}")) == ("a {}", "{} or {}")
    assert zero_shot.prompts(["x", "{}"], ["{} or {}"]) == ["x or x", "{} or {}"]
    given = zero_shot.read_class_names(file("tabby cat\n\ndog\n"))
    assert given.labels is None and given.of(("n1", "n2")) == ("tabby cat", "dog")
    given = zero_shot.read_class_names(file("n2\tdog\nn1\ttabby cat\nn3\then"))
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
    path = tmp_path / "own.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=says):
        getattr(zero_shot, read)(str(path))


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
