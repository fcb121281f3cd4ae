"""The Python of the documents runs, block by block in one namespace, and does what they say."""

import importlib
import json
import re

import jax
import numpy as np
import pytest
from PIL import Image

from tests.e2e.runner import ROOT
from tests.evaluators.small_models import labelled_shard
from webssl_jax import checkpoints, methods, train_state
from webssl_jax import config as configs
from webssl_jax import params as paths
from webssl_jax.data.sources import ArrayRecordSource
from webssl_jax.evaluators import outcome
from webssl_jax.model import Model, load
from webssl_jax.models import clip_sizes
from webssl_jax.models.features import Want
from webssl_jax.models.sizes import ViTConfig
from webssl_jax.optim.optimizer import Optimizer
from webssl_jax.sharding import mesh as meshes
from webssl_jax.weights.families import FAMILIES
from webssl_jax.weights.networks import Networks, template_of

SMALL = ["model.size=micro", "method.decoder.width=32", "method.decoder.heads=2", "global_batch=16"]
IMAGES = ("a.jpg", "b.png", "c.webp")
_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.M | re.S)
_FILE = re.compile(r"# (\w+)\.py\n")


def random_weights(template):
    """Of a tree of shapes; whatever scales is near 1, so that images stay apart."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        values = rng.normal(0, 0.1, leaf.shape).astype(np.float32)
        return values + 1 if path.endswith("scale") else values

    return paths.map_with_path(draw, template)


def make_run(workdir):
    """A run of Web-MAE with one checkpoint, of step 0, without compiling one."""
    config = configs.load("web_mae:size=tiny", SMALL)
    method = methods.create(config)
    optimizer = Optimizer.from_config(config.optim, method.tables())
    mesh = meshes.create(configs.load("web_mae:size=tiny").sharding, jax.devices()[:1])
    state = train_state.abstract(method, optimizer, 0, config.global_batch, mesh)
    arrays = jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), state)
    weights = jax.tree.map(
        lambda x, like: jax.device_put(x, like.sharding), random_weights(state.params), state.params
    )
    workdir.mkdir(parents=True)
    (workdir / "config.json").write_text(json.dumps(configs.resolved(config)))
    checkpointer = checkpoints.Checkpointer(workdir)
    checkpointer.save(arrays._replace(params=weights))
    checkpointer.close()


def make_clip(folder):
    """A folder of transformers with both of CLIP's towers, and its tokenizer."""
    encoder = clip_sizes.vision("micro", image_size=32)
    networks = Networks(encoder, text=clip_sizes.text("micro"))
    folder.parent.mkdir(parents=True)
    Model(networks, random_weights(template_of(networks))).save(folder, "hf-clip")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the documents say is there."""
    folder = tmp_path_factory.mktemp("docs")
    make_run(folder / "runs" / "mae")
    make_clip(folder / "weights" / "clip")
    rng = np.random.default_rng(0)
    for name, size in zip(IMAGES, ((40, 60, 3), (70, 50, 3), (64, 64, 3))):
        Image.fromarray(rng.integers(0, 256, size, np.uint8)).save(folder / name)
    return folder


def run_page(page, folder, monkeypatch):
    """The namespace after all blocks of a page, in order. A block that begins with ``# NAME.py`` is
    a file of that name."""
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    names, text = {}, (ROOT / page).read_text("utf-8")
    blocks = _BLOCK.findall(text)
    assert len(blocks) == text.count("```python") > 0
    for block in blocks:
        if file := _FILE.match(block):
            (folder / f"{file[1]}.py").write_text(block, "utf-8")
            importlib.invalidate_caches()
            importlib.import_module(file[1])
        else:
            exec(compile(block, page, "exec"), names)
    return names


def test_python_md_opens_one_network_in_four_formats_and_finds_the_same_features(
    folder, monkeypatch, capsys
):
    names = run_page("docs/python.md", folder, monkeypatch)
    assert "missing.jpg: no image can be read" in capsys.readouterr().out
    ours = load("runs/mae")(IMAGES)
    assert ours.cls.shape == (3, 32) and ours.patches.shape == (3, 6, 6, 32)
    assert np.linalg.norm(ours.cls[0] - ours.cls[1]) > 0.1  # images do not all look alike
    for path in ("export/hf-vit", "export/timm", "export/mae.pth"):
        theirs = load(path)(IMAGES)
        np.testing.assert_allclose(theirs.cls, ours.cls, atol=1e-5, err_msg=path)
        np.testing.assert_allclose(theirs.patches, ours.patches, atol=1e-5, err_msg=path)
    spread = names["features"]  # the last section that makes some: over all devices
    np.testing.assert_allclose(spread.cls, ours.cls, atol=1e-5)
    assert names["spread"].mesh.size == jax.device_count() > 1
    assert names["texts"].shape == (3, 16) and len(names["best"]) == 3
    assert names["known"].sizes["web-dino-7b"].depth == 32


@pytest.mark.slow
def test_language_md_reads_texts_and_embeddings(folder, monkeypatch):
    names = run_page("docs/language.md", folder, monkeypatch)
    assert names["states"].hidden.shape[:2] == (31, 2)
    assert names["out"].logits.shape == (2, 4, 128_256) and len(names["out"].hidden) == 3


def test_benchmarks_md_scores_an_answer(tmp_path, monkeypatch):
    names = run_page("docs/benchmarks.md", tmp_path, monkeypatch)
    assert names["score"].metrics["accuracy"] == 100 and names["score"].verdicts == {"0": 1.0}


def test_the_notebook_runs_from_its_first_cell_to_its_last(folder, monkeypatch):
    monkeypatch.chdir(folder)
    pattern = labelled_shard(folder, "notebook", 64)  # for speed, in the place of the corpus
    book = json.loads((ROOT / "docs" / "notebook.ipynb").read_text("utf-8"))
    cells = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert len(cells) > 5 and not any(cell["outputs"] for cell in cells)
    names = {}
    for number, cell in enumerate(cells):
        text = "".join(cell["source"]).replace('"corpus:test"', repr(pattern))
        exec(compile(text, f"cell {number}", "exec"), names)
    assert names["written"].rows == names["table"].num_rows == 64
    kept = np.array(names["table"]["cls"].to_pylist())
    np.testing.assert_allclose(kept, names["features"].cls, atol=1e-5)
    assert names["found"].shape == (4, 6) and names["sheet"].shape[2] == 3


def test_evaluation_md_leaves_an_outcome_that_is_read_again(folder, monkeypatch, capsys):
    made = run_page("docs/evaluation.md", folder, monkeypatch)["outcomes"]["words"]
    kept = outcome.read(folder / "evaluations" / "clip" / "eval" / "words" / "00000000.json")
    assert kept.metrics == made.metrics and made.items["top1"].shape == (256,)
    assert f"{made.metrics['top1']:.3f} ± " in capsys.readouterr().out


@pytest.fixture(scope="module")
def contributing(folder):
    with pytest.MonkeyPatch.context() as patch:
        return run_page("CONTRIBUTING.md", folder, patch)


def test_the_evaluation_of_contributing_md_judges_a_model_by_one_file_and_one_row(
    contributing, folder
):
    found = contributing["outcomes"]["means"]
    assert 0 <= found.metrics["top1"] <= 1 and found.se("top1") > 0
    assert found.items["top1"].shape == (256,)
    assert found.metrics["top1"] == pytest.approx(found.items["top1"].mean())
    assert (folder / "evaluations" / "own" / "eval" / "means" / "00000000.json").exists()


def test_the_method_of_contributing_md_has_a_loss_and_signs_that_it_logs(
    contributing, folder, monkeypatch
):
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setitem(methods.METHODS, "huber_mae", "huber_mae:HuberMAE")
    method = methods.create(configs.load("web_mae:size=tiny", [*SMALL, "method.name=huber_mae"]))
    batch = {
        "image": np.full((2, 48, 48, 3), 128, np.uint8),  # flat, and so is what is to be found
        "position": np.arange(2, dtype=np.int32),
    }
    params = random_weights(template_of(Networks.of(method)))
    params["decoder"]["pred"] = {"kernel": np.zeros((32, 192)), "bias": np.full(192, 3.0)}
    gap = np.abs(3 - (128 / 255 - np.array(method.mean)) / np.array(method.std))
    got = jax.jit(method.loss)(params, {}, {}, batch, jax.random.key(0), {})
    assert got.loss == pytest.approx((gap - 0.5).mean(), rel=1e-5)  # far off: a line of slope 1
    logged = {f"train/{name}" for name in (*got.terms, *got.report)}
    assert {sign.metric for sign in method.vitals(16).signs} <= logged


def test_the_weight_family_of_contributing_md_reads_what_it_writes(
    contributing, folder, monkeypatch
):
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setitem(FAMILIES, "my-pth", importlib.import_module("my_library").FAMILY)
    vit = ViTConfig(width=32, depth=2, heads=4, patch_size=8, image_size=32, position="learned")
    networks = Networks(vit)
    model = Model(networks, random_weights(template_of(networks)))
    model.save(folder / "mine.pth", "my-pth")
    again = load(folder / "mine.pth", heads=4)
    assert again.origin.family == "my-pth"
    ours, theirs = paths.flatten(model.params), paths.flatten(again.params)
    assert ours.keys() == theirs.keys()
    for path, leaf in ours.items():
        np.testing.assert_array_equal(theirs[path], leaf, err_msg=path)


def test_the_sources_of_contributing_md_give_records_and_candidates(contributing, folder):
    source = ArrayRecordSource(str(folder / "shards"))
    assert len(source) == 3
    lists = importlib.import_module("list_reader")
    (folder / "list.tsv").write_text("a.jpg\tone\nnone.jpg\ttwo\n", "utf-8")
    reader = lists.ListReader(str(folder), "list")
    found = [item for unit in lists.list_units(folder / "list.tsv") for item in reader.read(unit)]
    assert found[0].data == (folder / "a.jpg").read_bytes() and found[0].captions == ("one",)
    assert found[1].key == "none.jpg" and found[1].reason == "unreadable file"


def test_features_of_want_are_those_that_python_md_lists():
    page = (ROOT / "docs" / "python.md").read_text("utf-8")
    table = re.findall(r"^\| `(\w+)` \| `?([^`|]+?)`? \|", page, re.M)
    assert {name: default for name, default in table} == {
        name: repr(default).replace("'", '"') for name, default in vars(Want()).items()
    }
