"""What a person mistypes: one line, exit code 2, no traceback, before anything compiles."""

import re

from tests.e2e import runner

BAD = [
    ({"optim.lrr": 1}, "--config.optim.lrr: no such key; did you mean --config.optim.lr?"),
    ({"global_batch": "x"}, "'x' is not of type int"),
    ({"model.size": "enormous"}, "no Web-MAE size 'enormous'"),
    ({"method.name": "mea"}, "no method 'mea'"),
    ({"method.view.image_size": 33}, "33"),
    ({"method.mask_ratio": 1.5}, "mask_ratio"),
    ({"global_batch": 12, "sharding.fsdp": 8}, "is not the 1 devices"),
    ({"data.train": "/nowhere/*.arrayrecord"}, "/nowhere"),
    ({"optim.frozen": "('encodr',)"}, "'encodr' matches no parameter"),
    ({"init_from": "/nowhere"}, "/nowhere"),
    ({"model.qkv_bias": "off"}, "qkv_bias = 'off' must be true or false"),
    ({"checkpoint.every_images": 5}, "did you mean --config.checkpoint.every_steps?"),
    ({"optim.lr_multipliers": "('encoder',0.1)"}, "rows of (regex, factor"),
    (
        {"evals.pairs.kind": "retrieval", "evals.pairs.pairs": "corpus:test"},
        "config.evals.pairs: MAE has no text tower",
    ),
    ({"model.drop_path": 0.5, "accumulation_steps": 2}, "config.accumulation_steps = 2"),
]


def test_a_bad_config_or_flag_is_one_line_and_exit_code_2(tmp_path):
    flags = [
        (["--wrokdir", "x"], "did you mean '--workdir'?"),
        (["--config.seed"], "--config.seed: give a value"),  # the next flag is another override
    ]
    found = [runner.train(tmp_path / "run", overrides) for overrides, _ in BAD]
    found += [runner.train(tmp_path / "run", flags=given) for given, _ in flags]
    for (given, says), result in zip([*BAD, *flags], found, strict=True):
        errors = [line for line in result.output.splitlines() if line.startswith("error: ")]
        assert result.code == 2 and len(errors) == 1 and says in errors[0], (given, result)
        assert "Traceback" not in result.output


def test_a_workdir_belongs_to_one_experiment_and_its_weights_are_a_start(tmp_path):
    first, second, third = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    assert runner.train(first, {"total_steps": 3}).code == 0
    result = runner.train(first, {"global_batch": 32})
    assert result.code == 2 and "config.global_batch: 16 -> 32; put" in result.output

    result = runner.train(second, {"init_from": first, "total_steps": 3})
    assert result.code == 0 and "starting from the weights" in result.output
    assert runner.losses(second)[1] < runner.losses(first)[1]
    result = runner.train(third, {"resume_from": first, "total_steps": 5})
    assert result.code == 0 and "resuming at step 3 of 5" in result.output
    assert sorted(runner.losses(third)) == [4, 5]

    # longer is allowed, and told
    result = runner.train(first, {"total_steps": 4})
    assert result.code == 0 and "changed: config.total_steps: 3 -> 4" in result.output
    assert "learning_rate jumps from" in result.output
    stamp = r"^\d\d-\d\d \d\d:\d\d:\d\d "
    for words in ("compiling the step, which", "finished 4 steps", "train 4/4 steps"):
        assert len(re.findall(stamp + words, result.output, re.MULTILINE)) == 1, result.output
