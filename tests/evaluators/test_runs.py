"""What an evaluation leaves in a workdir, what it asks of a config, and what it says when it
cannot."""

import pathlib
import types

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from tests.data.image_shards import encode_image, write_shard
from tests.evaluators.small_clip import BATCH, MESH, small_clip
from webssl_jax import config as configs
from webssl_jax.config import ConfigError, UserError
from webssl_jax.data import records
from webssl_jax.evaluators.results import Result, read_result
from webssl_jax.evaluators.runs import RunEvaluation, check_text_files, check_texts
from webssl_jax.sharding import distributed

NOTHING = {
    "train": "",
    "test": "",
    "batch": BATCH,
    "max_images": 0,
    "last_blocks": 4,
    "zero_shot": "",
    "class_names": "",
    "retrieval": "",
    "retrieval_images": 0,
}


def entry(**given):
    return ConfigDict(NOTHING | given)


@pytest.fixture
def shards(tmp_path):
    """24 images of three classes, each with its own caption."""
    rng = np.random.default_rng(0)
    items = [
        records.Record(
            encode_image(rng.integers(0, 256, (20, 20, 3), np.uint8)),
            (f"the {i}th {label}",),
            str(i),
            20,
            20,
            "test",
            label,
        )
        for i, label in enumerate(["cat", "dog", "hen"] * 8)
    ]
    write_shard(tmp_path / "own-00000-of-00001.arrayrecord", list(map(records.encode, items)))
    return str(tmp_path / "own-*.arrayrecord")


def test_words_alone_need_no_training_images_and_figures_are_kept_for_later_steps(shards, tmp_path):
    method, variables = small_clip()
    given = entry(test=shards, zero_shot="short", retrieval=shards, retrieval_images=10)
    evaluation = RunEvaluation(given, method, MESH, tmp_path / "run")
    first = evaluation.run(variables, 0)
    second = evaluation.run(variables, 7)
    ways = [f"{way}_r{k}" for way in ("image_to_text", "text_to_image") for k in (1, 10, 5)]
    wanted = [f"retrieval/{way}" for way in ways] + ["zero_shot/top1", "zero_shot/top5"]
    assert set(first.metrics()) == {f"eval/{name}{end}" for name in wanted for end in ("", "_se")}
    assert first.metrics()["eval/retrieval/text_to_image_r10"] == 1  # there are ten
    assert first.metrics()["eval/zero_shot/top5"] == 1  # there are three
    kept = read_result(tmp_path / "run" / "eval" / "00000007.json")
    assert kept.metrics() == second.metrics() and kept.step == 7 and kept.frozen is None
    assert not (tmp_path / "run" / "eval" / "baselines.json").exists()
    printed = evaluation.report(second)
    for line in ("chance", "step 0 (untrained)", "step 7 (this model)", "text to image, chance"):
        assert line in printed
    assert "of 3 classes" in printed and "10 images" in printed and "7 templates" in printed
    assert "zero-shot 0." in second.line() and "image to text R@10 1.000" in second.line()


def test_names_of_a_file_may_say_more_classes_than_the_images_have(shards, tmp_path):
    method, variables = small_clip()
    file = tmp_path / "names.txt"
    file.write_text("emu\ta large bird\ncat\ta cat\ndog\ta dog\nhen\ta hen\n")
    given = entry(test=shards, zero_shot="short", class_names=str(file))
    made = RunEvaluation(given, method, MESH, tmp_path).run(variables, 0)
    assert made.zero_shot.classes == 4 and made.zero_shot.templates == 7
    file.write_text("a cat\na dog\n")
    with pytest.raises(UserError, match="2 class names, but the records have 3 labels .cat, dog"):
        RunEvaluation(given, method, MESH, tmp_path)
    file.write_text("cat\ta cat\ndog\ta dog\n")
    with pytest.raises(UserError, match="label 'hen' is none of the 2 known classes"):
        RunEvaluation(given, method, MESH, tmp_path)


def test_what_a_method_or_a_file_cannot_give_is_refused_before_anything_is_made():
    class Deaf:
        pass

    for key in ("zero_shot", "retrieval"):
        with pytest.raises(ConfigError, match=f"config.eval.{key} = x: Deaf has no text tower"):
            check_texts(entry(**{key: "x"}), Deaf())
    method, _ = small_clip()
    with pytest.raises(UserError, match="no list of that name"):
        check_text_files(entry(zero_shot="x"))
    with pytest.raises(UserError, match="no class names can be read"):
        check_text_files(entry(zero_shot="short", class_names="/nowhere"))
    with pytest.raises(UserError, match="/nowhere"):
        RunEvaluation(entry(retrieval="/nowhere/*.arrayrecord"), method, MESH, "")
    config = ConfigDict({"eval": NOTHING, "data": {"threads": 2}})
    assert RunEvaluation.from_config(config, method, MESH, "") is None


@pytest.mark.parametrize(
    "overrides, says",
    [
        (
            ["eval.zero_shot=short"],
            "config.eval.test = '': must be labelled shards if eval.train or",
        ),
        (["eval.test=corpus:test"], "config.eval.test = .*and empty if neither is"),
        (["eval.class_names=x"], "config.eval.class_names = 'x': must be empty without"),
        (["eval.retrieval_images=-1"], "config.eval.retrieval_images = -1: must be zero"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(overrides, says):
    clip = pathlib.Path(__file__).parent.parent.parent / "configs/clip.py"
    with pytest.raises(ConfigError, match=says):
        configs.load(f"{clip}:size=tiny", overrides)


def test_a_damaged_result_is_one_line(tmp_path):
    for text in ("{", "[]", '{"step": 3, "retrieval": {}}'):
        (tmp_path / "3.json").write_text(text)
        with pytest.raises(UserError, match="3.json: cannot be read"):
            read_result(tmp_path / "3.json")


def make(folder, writes=True):
    made = RunEvaluation.__new__(RunEvaluation)
    made._frozen = made._zero_shot = None
    made._retrieval = types.SimpleNamespace(measure=lambda bound: None)
    made._bind_towers = lambda variables: None
    made._folder, made._writes = folder, writes
    return made


def test_a_result_is_kept_and_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    make(tmp_path / "eval").run(None, 3)
    assert read_result(tmp_path / "eval" / "00000003.json") == Result(3)
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        make(tmp_path / "file").run(None, 3)


def test_what_the_first_process_cannot_write_ends_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(distributed, "gather", lambda flag: np.array([True, flag]))
    with pytest.raises(UserError, match="process 0 stopped"):
        make(tmp_path / "eval", writes=False).run(None, 3)
    assert not (tmp_path / "eval").exists()
