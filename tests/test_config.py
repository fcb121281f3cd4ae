import json
import os
import pathlib
import shutil
import sys
import types

import ml_collections
import pytest

from tests.configs import update
from webssl_jax import cli, config_files, methods
from webssl_jax import config as configs
from webssl_jax.config import ConfigError
from webssl_jax.configs import common
from webssl_jax.errors import suggest

ROOT = pathlib.Path(__file__).parent.parent
MAE = str(ROOT / "configs" / "web_mae.py")


def error(spec, *overrides):
    with pytest.raises(ConfigError) as caught:
        configs.load(spec, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_unknown_key_is_refused_with_the_nearest_real_one():
    assert "did you mean --config.optim.lr?" in error(MAE, "optim.lrr=1")
    assert "did you mean --config.optim.weight_decay?" in error(MAE, "weight_decay=1")
    assert "did you mean --config.optim.lr?" in error(MAE, "learning_rate=1")
    assert "did you mean --config.optim.lr?" in error(MAE, "optim.learning_rate=1")
    assert "did you mean --config.global_batch?" in error(MAE, "batch_size=1")
    assert "did you mean --config.total_images?" in error(MAE, "epochs=1")
    assert "did you mean --config.optim.warmup_images?" in error(MAE, "warmup_epochs=1")
    assert "did you mean --config.optim.final_lr?" in error(MAE, "optim.min_lr=1")


def test_a_value_of_the_wrong_type_is_refused():
    assert "not of type int" in error(MAE, "global_batch=many")
    assert "is float, not int" in error(MAE, "global_batch=1.5")
    assert "not of type bool" in error(MAE, "checkpoint.restore_once=perhaps")
    assert "group of keys" in error(MAE, "optim=3")


def test_trackers_are_named_with_commas_and_a_wrong_one_is_refused():
    assert configs.tracker_names("wandb, tensorboard,wandb") == ("wandb", "tensorboard")
    assert configs.tracker_names("none") == ()
    assert "no tracker 'wandbb'; did you mean 'wandb'?" in error(MAE, "log.trackers=wandbb")
    assert "no tracker ''; known: mlflow, none, tens" in error(MAE, "log.trackers=")


def test_values_take_the_type_of_what_they_replace():
    config = configs.load(
        MAE,
        [
            "total_images=2e6",
            "optim.lr=1",
            "checkpoint.restore_once=true",
            "optim.frozen=('a','b')",
            "data.train=/a=b",
            "optim.warmup_steps=3",
        ],
    )
    assert config.total_images == 2_000_000 and isinstance(config.total_images, int)
    assert isinstance(config.optim.lr, float)
    assert config.checkpoint.restore_once is True
    assert config.optim.frozen == ("a", "b")
    assert config.data.train == "/a=b"


def test_a_duration_may_be_given_in_another_unit():
    config = configs.load(MAE, ["total_steps=1000", "optim.warmup_percent=10"])
    assert configs.total_steps(config) == 1000
    assert configs.steps(config.optim, "warmup", config) == 100
    assert "warmup_images" not in config.optim and "total_images" not in config
    config = configs.load(MAE, ["optim.warmup_images=409600"])
    assert configs.steps(config.optim, "warmup", config) == 100


@pytest.mark.parametrize(
    "override, nearest",
    [
        ("checkpoint.every_images=5", "checkpoint.every_steps"),
        ("log.every_percent=5", "log.every_steps"),
        ("pictures.every_step=5", "pictures.every_steps"),
        ("total_percent=5", "total_images"),
    ],
)
def test_only_durations_have_other_units(override, nearest):
    message = error(MAE, override)
    assert "no such key" in message and f"did you mean --config.{nearest}?" in message


def test_a_duration_in_two_units_at_once_is_refused(tmp_path):
    both = tmp_path / "both.py"
    both.write_text(
        "from webssl_jax.configs.web_mae import get_config as base\n"
        "def get_config(arg):\n"
        "    config = base(arg)\n"
        "    config.optim.warmup_steps = 3\n"
        "    return config\n"
    )
    assert "must be given once" in error(str(both))
    assert "warmup_steps, optim.warmup_images" in error(str(both))


@pytest.mark.parametrize(
    "text, value",
    [("false", False), ("True", True), ("none", None), ("3", 3), ("0.5", 0.5), ("gelu", "gelu")],
)
def test_a_key_without_a_value_takes_any_literal_and_words_for_true_false_none(text, value):
    config = configs.load(MAE, [f"model.qkv_bias={text}"])
    assert config.model.qkv_bias == value and type(config.model.qkv_bias) is type(value)


def test_a_switch_of_the_model_can_be_turned_off_and_reaches_the_network():
    assert not methods.create(configs.load(MAE, ["model.qkv_bias=false"])).encoder.qkv_bias
    assert methods.create(configs.load(MAE)).encoder.qkv_bias


@pytest.mark.parametrize(
    "override, says",
    [
        ("model.qkv_bias=off", "qkv_bias = 'off' must be true or false"),
        ("model.mask_token=0", "mask_token = 0 must be true or false"),
        ("model.depth=2.5", "depth = 2.5 must be a whole number"),
        ("model.width=foo", "width = 'foo' must be a whole number"),
        ("model.mlp_hidden=2.5", "mlp_hidden = 2.5 must be a whole number or none"),
        ("model.layer_scale=true", "layer_scale = True must be a number or none"),
        ("model.num_registers=-1", "num_registers = -1 must be zero or positive"),
        ("method.mean=0.5", "mean = (0.5,) must be three numbers"),
        ("method.mean=(0.5,0.5,'x')", "mean = (0.5, 0.5, 'x') must be a tuple, each a number"),
        ("method.std=(0.1,0,0.1)", "must be positive"),
        ("method.view.scale_min=0", "method.view: scale_min = 0.0"),
        ("method.view.scale_max=1.5", "scale_max = 1.5"),
        ("method.view.hflip=2", "hflip = 2.0 must lie in [0, 1]"),
        ("method.decoder.heads=7", "method.decoder: width = 512 does not divide into heads = 7"),
    ],
)
def test_a_field_of_model_or_method_that_cannot_be_is_refused(override, says):
    config = configs.load(MAE, [override])
    with pytest.raises(ConfigError) as caught:
        methods.create(config)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_the_learning_rate_follows_the_batch_by_the_configs_rule():
    def rate(*overrides):
        return configs.learning_rate(configs.load(MAE, overrides))

    assert rate() == 1.6e-3
    assert rate("global_batch=1024") == pytest.approx(4e-4)
    assert rate("global_batch=1024", "optim.lr_scaling=sqrt") == pytest.approx(8e-4)
    assert rate("global_batch=1024", "optim.lr_scaling=none") == 1.6e-3
    assert rate("optim.lr=1.5e-4", "optim.lr_batch=256") == pytest.approx(2.4e-3)  # MAE's blr
    config = configs.load(MAE, ["global_batch=1024"])
    derived = configs.resolved(config)["derived"]
    assert derived["learning_rate"] == configs.learning_rate(config)
    # the warm-up stays the same number of images
    assert (derived["warmup_steps"], derived["total_steps"]) == (320_000, 1_953_125)


def test_the_quick_starts_rate_is_that_of_its_own_batch():
    config = configs.load(str(ROOT / "configs" / "quickstart.py"))
    assert config.optim.lr_batch == config.global_batch
    assert configs.learning_rate(config) == config.optim.lr == 2e-3


def test_one_weight_decay_is_constant_and_two_are_the_ends():
    assert configs.weight_decays(configs.load(MAE)) == (0.05, 0.05)
    assert configs.weight_decays(configs.load(MAE, ["optim.weight_decay=0.1"])) == (0.1, 0.1)
    two = ["optim.weight_decay=0.04", "optim.final_weight_decay=0.4"]
    assert configs.weight_decays(configs.load(MAE, two)) == (0.04, 0.4)
    assert configs.weight_decays(configs.load(MAE, [*two, "optim.final_weight_decay=0"]))[1] == 0


def test_lists_of_the_optimiser_are_read_as_written():
    config = configs.load(
        MAE, ["optim.lr_multipliers=(('encoder/', 0.1), ('norm', 0))", "optim.frozen=('cls',)"]
    )
    assert config.optim.lr_multipliers == (("encoder/", 0.1), ("norm", 0))
    assert config.optim.frozen == ("cls",)


@pytest.mark.parametrize(
    "override, says",
    [
        ("global_batch=0", "positive"),
        ("accumulation_steps=3", "a divisor of global_batch"),
        ("optim.lr=-1", "positive"),
        ("total_images=10", "at least one step"),
        ("optim.clip=both", "none, global or per_module"),
        ("optim.warmup_steps=999999999", "shorten it"),
        ("total_steps=1000", "as by --config.optim.warmup_percent=10, or lengthen the run"),
        ("optim.lr_schedule=linear", "cosine or constant"),
        ("optim.cooldown_percent=10", "only config.optim.lr_schedule = 'constant' has one"),
        ("optim.cooldown_percent=101", "cooldown_percent=10"),
        ("sharding.fsdp=0", "-1 for all"),
        ("data.threads=0", "positive"),
        ("sharding.tensor=-1", "only axis"),
        ("seed=-1", "2**32"),
        ("seed=4294967296", "2**32"),
        ("optim.lr=1e999", "finite"),
        ("optim.lr_scaling=cubic", "linear, sqrt or none"),
        ("optim.lr_batch=0", "positive number of images"),
        ("optim.final_lr=-1e-6", "zero or positive"),
        ("optim.final_weight_decay=-1", "none for that of weight_decay"),
        ("optim.final_weight_decay=much", "none for that of weight_decay"),
        ("optim.eps=0", "positive"),
        ("optim.moment_dtype=float16", "float32 or bfloat16"),
        ("optim.lr_multipliers=('encoder',0.1)", "rows of (regex, factor"),
        ("optim.lr_multipliers=(('encoder','x'),)", "rows of (regex, factor"),
        ("optim.lr_multipliers=(('(',0.1),)", "rows of (regex, factor"),
        ("optim.lr_multipliers=(('encoder',-1),)", "rows of (regex, factor"),
        ("optim.frozen=('(',)", "regular expressions"),
        ("optim.frozen=(3,)", "regular expressions"),
        ("optim.abort_after_skipped=0", "at least 1"),
        ("eval_batch=0", "at least 1"),
        ("checkpoint.folder=s3://bucket/run", "a path or gs://BUCKET/FOLDER"),
        ("checkpoint.folder=gs://bucket/", "a path or gs://BUCKET/FOLDER"),
        ("host.stuck_pause_minutes=-1", "zero (no limit) or positive"),
        ("evals.knn.max.images=1", "write evals.ROW.KEY=VALUE"),
        ("evals.knnn=none", "no such row"),
        ("pictures.images=0", "between 1 and 64"),
        ("pictures.images=65", "between 1 and 64"),
        ("pictures.every_steps=-1", "zero (only"),
        ("pictures.candidates=1", "at least 2"),
    ],
)
def test_values_out_of_range_are_refused(override, says):
    message = error(MAE, override)
    assert says in message and "config." in message


def test_a_missing_config_file_names_its_neighbours(tmp_path):
    assert "did you mean" in error(str(ROOT / "configs" / "webmae.py"))
    assert "no such file; shipped configs go by name: clip, " in error(str(tmp_path / "x.py"))
    assert "no such file; the shipped config is --config clip" in error(str(tmp_path / "clip.py"))
    assert "no such file; the shipped config is --config clip" in error("configs/clip")
    assert "no such file" in error(str(ROOT / "README.md"))


def test_a_shipped_config_goes_by_its_name_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    by_name = configs.load("web_dino:size=1b", ["optim.lr=1"])
    assert by_name == configs.load(f"{ROOT}/configs/web_dino.py:size=1b", ["optim.lr=1"])
    assert "no such config; did you mean 'web_dino'? (known: clip," in error("webdino:size=1b")
    assert "no such config; known: clip, dinov2, " in error("xyz")
    assert "no such config" in error("common") and "no such config" in error("__init__")


def test_every_folder_has_its_own_common(tmp_path):
    text = (ROOT / "configs" / "common.py").read_text()
    assert text.count('"keep_last": 2,') == 1
    for kept in (5, 6):
        folder = tmp_path / str(kept)
        folder.mkdir()
        for name in ("web_mae.py", "quickstart.py"):
            shutil.copy(ROOT / "configs" / name, folder)
        changed = text.replace('"keep_last": 2,', f'"keep_last": {kept},')
        (folder / "common.py").write_text(changed)
    folders = [tmp_path / "5", tmp_path / "6", ROOT / "configs", tmp_path / "5"]
    for name in ("web_mae", "quickstart"):  # quickstart has it by web_mae, too
        loaded = [configs.load(str(folder / f"{name}.py")) for folder in folders]
        assert [config.checkpoint.keep_last for config in loaded] == [5, 6, 2, 5]
        assert configs.load(name).checkpoint.keep_last == 2
    (tmp_path / "5" / "common.py").write_text(text.replace('"keep_last": 2,', '"keep_last": 77,'))
    assert configs.load(str(tmp_path / "5" / "web_mae.py")).checkpoint.keep_last == 77


def test_a_file_anywhere_may_build_on_the_shipped_ones(tmp_path):
    file = tmp_path / "lr 1e-3.v2.py"  # no name of a module
    file.write_text(
        "from webssl_jax.configs import common, web_mae\n"
        "from . import more\n"
        "import json\n"  # of Python, whatever lies beside
        "def get_config(arg=None):\n"
        "    config = web_mae.get_config(arg)\n"
        "    config.seed = more.SEED\n"
        "    assert json.dumps(1) and common.base()\n"
        "    return config\n"
    )
    (tmp_path / "more.py").write_text("from .seeds.first import SEED\n")
    (tmp_path / "json.py").write_text("")
    (tmp_path / "seeds").mkdir()
    (tmp_path / "seeds" / "first.py").write_text("SEED = 17\n")
    config = configs.load(f"{file}:size=tiny")
    assert config.seed == 17 and config.name == "web_mae_tiny_paper"


@pytest.mark.parametrize(
    "line",
    ["import common", "import os, common.x", "from common import base, vit", "  import common"],
)
def test_a_plain_import_of_a_file_beside_is_refused(tmp_path, monkeypatch, line):
    """Whichever folder the first ``common`` came from, Python would give that one again."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, "common", types.ModuleType("common"))
    (tmp_path / "common.py").write_text("base = vit = None\n")
    body = f"def f():\n{line}\n" if line.startswith(" ") else f"\n{line}\n"
    (tmp_path / "inner.py").write_text(body)
    (tmp_path / "outer.py").write_text("from .inner import *\ndef get_config(arg): 1 / 0\n")
    for name in ("inner", "outer"):
        says = error(str(tmp_path / f"{name}.py"))
        assert f"{tmp_path}/inner.py:2: import of common: write `from . import common`" in says


GOOD = "from webssl_jax.configs.web_mae import get_config as web_mae\n"


@pytest.mark.parametrize(
    "text, line, says",
    [
        ("import web_mae\n", 1, "the shipped one: from webssl_jax.configs import web_mae"),
        ("from . import common\n", 1, "the shipped one: from webssl_jax.configs import common"),
        ("from .common import base\n", 1, "the shipped one: from webssl_jax.configs import common"),
        ("import no_such_package\n", 1, "ModuleNotFoundError: No module named 'no_such_package'"),
        ("x = 1\nx = = 2\n", 2, "invalid syntax"),
        ("x = 1\n\nx = y\n", 3, "NameError: name 'y' is not defined"),
        (f"{GOOD}def get_config(arg):\n  c = web_mae(arg)\n  return c.x\n", 4, "'x'"),
        (f"{GOOD}def get_config(arg):\n  return web_mae({{}}['a'])\n", 3, "KeyError: 'a'"),
        ("def get_config(arg):\n  raise ValueError('two\\nlines')\n", 2, "ValueError: two lines"),
        ("from webssl_jax.configs.common import vit\nvit()\n", 2, "TypeError: vit() missing"),
        ("def get_config(): pass\n", None, "takes 0 positional arguments but 1 was given"),
        ("raise SystemExit(3)\n", None, "ends the program (3) instead of giving a config"),
        ("def get_config(arg): return {}\n", None, "returned dict; it must return a ConfigDict"),
        ("", None, "has no get_config(arg)"),
    ],
)
def test_an_error_in_a_config_file_is_one_line_that_says_where(tmp_path, text, line, says):
    file = tmp_path / "mine.py"
    file.write_text(text)
    message = error(str(file))
    where = f"{file}:{line}: " if line else str(file)
    assert where in message and says in message, message
    assert config_files._package(tmp_path) not in message


def test_an_error_beside_a_config_file_names_that_file(tmp_path):
    (tmp_path / "mine.py").write_text("from . import other\n")
    (tmp_path / "other.py").write_text("\n\nother = 1 / 0\n")
    assert error(str(tmp_path / "mine.py")).startswith(f"{tmp_path}/other.py:3: ZeroDivisionError")
    (tmp_path / "other.py").write_text("\ndef f(:\n")
    assert error(str(tmp_path / "mine.py")).startswith(f"{tmp_path}/other.py:2: ")


def test_an_unknown_argument_or_size_is_refused():
    assert "did you mean 'size'" in error(MAE + ":siez=1b")
    assert "recipe" in error(MAE + ":recipe=papper")
    assert "write size=VALUE" in error(MAE + ":size")


def test_a_resolved_config_reads_back_as_the_same_config():
    config = configs.load(MAE + ":size=1b", ["optim.warmup_percent=3"])
    text = json.dumps(configs.resolved(config))
    again = configs.from_resolved(json.loads(text))
    assert configs.resolved(again) == json.loads(text)
    assert isinstance(again, ml_collections.ConfigDict)


def own(tmp_path, *lines):
    file = tmp_path / "own.py"
    body = "".join(f"    {line}\n" for line in lines)
    file.write_text(
        f"{GOOD}def get_config(arg):\n    config = web_mae(arg)\n{body}    return config\n"
    )
    return str(file)


def test_a_key_that_a_config_file_adds_is_refused_at_its_line(tmp_path):
    says = error(own(tmp_path, "config.seed = 1", "config.optim.lrr = 1.0"))
    assert (
        says == f"{tmp_path}/own.py:5: config.optim.lrr: no such key; did you mean config.optim.lr?"
    )
    says = error(own(tmp_path, "config.evalss = {'a': 1}"))
    assert "own.py:4: config.evalss: no such key; did you mean config.evals?" in says
    assert "own.py:4: config.log.every: no such" in error(own(tmp_path, "config.log.every = 5"))
    # two files of one size within a second: the second is not taken for the first
    for line, key in (("config.optim = {}", "optim.abort_after"), ("del config.method", "method;")):
        file = own(tmp_path, line)
        os.utime(file, (1e9, 1e9))
        assert f"has no config.{key}" in error(file)
    two = own(tmp_path, "del config.optim.warmup_images", "config.optim.warmup_percent = 1.0")
    assert configs.load(two).optim.warmup_percent == 1.0


def test_a_printed_config_is_a_config_and_yaml_is_refused(tmp_path):
    config = configs.load("web_dino:size=tiny", ["optim.warmup_percent=3"])
    file = tmp_path / "config.json"
    file.write_text(json.dumps(configs.resolved(config)))
    again = configs.load(str(file), ["optim.lr=0.5", "method.view.jitter=0.2"])
    assert again.optim.lr == 0.5 and methods.create(again).view.jitter == 0.2
    assert configs.resolved(configs.load(str(file))) == configs.resolved(config)
    assert "takes no arguments" in error(f"{file}:size=tiny")
    values = configs.resolved(config)
    values["optim"]["lrr"] = 1.0
    file.write_text(json.dumps(values, indent=1))
    assert f"{file}:" in error(str(file)) and "config.optim.lrr: no such key" in error(str(file))
    values = configs.resolved(config) | {"seed": "x"}
    file.write_text(json.dumps(values, indent=1))
    assert "config.seed = 'x': must be of type int" in error(str(file))
    file.write_text("{")
    assert "its JSON cannot be read" in error(str(file))
    file.write_text("[]")
    assert "no object of keys" in error(str(file))
    assert "YAML is not read; give a FILE.py, or a FILE.json" in error("config.yaml")


def test_differences_name_each_key_with_both_values():
    before = {"model": {"width": 32, "depth": 2}, "seed": 1, "evals": {"knn": {"kind": "knn"}}}
    now = {"model": {"width": 48, "depth": 2, "heads": None}, "seed": 1, "evals": {}}
    assert configs.differences(before, now) == [
        ("evals.knn.kind", "knn", "unset"),
        ("model.heads", "unset", None),
        ("model.width", 32, 48),
    ]


GOLDEN = json.loads(update.FILE.read_text())


def test_the_goldens_are_exactly_those_of_the_specs():
    assert GOLDEN.keys() == {"common", *update.SPECS} and len(GOLDEN) == 1 + len(update.SPECS)
    files = {path.stem for path in (ROOT / "configs").glob("*.py")} - {"common", "__init__"}
    assert files == {spec for spec in GOLDEN if ":" not in spec} - {"common"}
    assert files == set(config_files.names())  # every experiment has one
    made = update.golden(common.base(), configs.load, update.SPECS)
    text = json.dumps(made, indent=1, sort_keys=True) + "\n"
    assert text == update.FILE.read_text()  # no difference that makes none


# What a config cannot know: the labels of the user's records, the user's teacher.
NAMED_BY_THE_USER = {"supervised": "method.classes", "distill": "method.weights"}


@pytest.mark.parametrize("spec", update.SPECS)
def test_the_resolved_config_is_the_committed_one(spec):
    """A change here is a change of a recipe: say why in the commit, then run
    python -m tests.configs.update."""
    config = configs.load(spec)
    assert update.flat(config) == update.rebuilt(GOLDEN, spec)
    missing = [key for name, key in NAMED_BY_THE_USER.items() if spec.split(":")[0] == name]
    if missing and "tiny" not in spec or missing == ["method.weights"]:
        with pytest.raises(ConfigError, match=f"{missing[0]}: name "):
            methods.create(config)
    else:
        methods.create(config)  # and it describes a method


def test_a_change_of_what_all_share_changes_one_entry_of_the_goldens(tmp_path):
    folder = shutil.copytree(ROOT / "configs", tmp_path / "configs")
    file = folder / "common.py"
    file.write_text(file.read_text().replace('"keep_last": 2,', '"keep_last": 3, "new": 1.0,'))

    def load(spec):
        name, _, arg = spec.partition(":")
        return configs.load(f"{folder}/{name}.py:{arg}")

    specs = [spec for spec in update.SPECS if ":" not in spec or "tiny" in spec]
    bare = folder / "bare.py"
    bare.write_text("from . import common\ndef get_config(arg):\n    return common.base()\n")
    made = update.golden(config_files.get_config(str(bare), ""), load, specs)
    assert made.pop("common") != GOLDEN["common"]
    assert made == {spec: GOLDEN[spec] for spec in specs}


@pytest.mark.parametrize(
    "name, known, meant",
    [
        ("WebDINO", ["web_dino", "dinov2"], "web_dino"),
        ("mae", ["clip", "web_mae"], "web_mae"),
        ("dinov2", ["dinov2-pth", "hf-dinov2"], "hf-dinov2"),
        ("tars", ["folder", "tar", "parquet"], "tar"),
        ("webdataset", ["folder", "tar", "parquet"], "tar"),
        ("linear", ["knn", "logistic", "retrieval"], "logistic"),
    ],
)
def test_the_first_suggestion_points_right(name, known, meant):
    assert suggest(name, known).startswith(f"did you mean {meant!r}? (known: ")


def test_a_wrong_choice_of_a_flag_names_the_nearest(capsys):
    parser = cli.ArgumentParser()
    parser.add_argument("kind", metavar="KIND", choices=["folder", "tar"])
    with pytest.raises(SystemExit):
        parser.parse_args(["tra"])
    says = "error: argument KIND: no such choice 'tra'; did you mean 'tar'? (known: folder, tar)\n"
    assert capsys.readouterr().err == says


@pytest.mark.parametrize("rest", [["--config.seed", "--config.name=a"], ["--config.seed"]])
def test_an_override_does_not_take_the_next_flag_for_its_value(rest, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.ArgumentParser().parse_with_overrides(rest)
    assert exit.value.code == cli.EXIT_BAD_INPUT
    assert capsys.readouterr().err == "error: --config.seed: give a value\n"


def test_an_override_may_stand_apart_from_its_value():
    argv = ["--config.sharding.fsdp", "-1", "--config.name=", "--config.data.train", "/a=b"]
    _, overrides = cli.ArgumentParser().parse_with_overrides(argv)
    assert overrides == ["sharding.fsdp=-1", "name=", "data.train=/a=b"]


def test_the_papers_web_mae_recipe():
    """recipes.md sections 0 and 3: 2B images at 4096 are 488,281 steps, 80K of them warm-up, rate
    1.6e-3."""
    config = configs.load(MAE + ":size=1b")
    assert configs.total_steps(config) == 488_281
    assert configs.steps(config.optim, "warmup", config) == 80_000
    assert configs.learning_rate(config) == 1.6e-3
    assert (config.optim.b1, config.optim.b2) == (0.9, 0.95)
    stock = configs.load(MAE + ":size=1b,recipe=stock")
    assert configs.learning_rate(stock) == pytest.approx(2.4e-3)
    assert configs.steps(stock.optim, "warmup", stock) / configs.total_steps(
        stock
    ) == pytest.approx(0.05, rel=1e-3)


def test_the_size_of_a_view_may_be_a_side_or_two_and_is_the_same_after_json():
    spec = "configs/web_mae.py:size=tiny"
    for text, size in (("64", 64), ("32,64", (32, 64)), ("(32, 64)", (32, 64))):
        config = configs.load(spec, [f"method.view.image_size={text}"])
        method = methods.create(config)
        assert method.view.image_size == size
        again = configs.from_resolved(json.loads(json.dumps(configs.resolved(config))))
        assert methods.create(again) == method
    for text in ("wide", "32,64,3", "0,32", "1.5", "-8"):
        with pytest.raises(ConfigError, match="image_size = "):
            methods.create(configs.load(spec, [f"method.view.image_size={text}"]))
