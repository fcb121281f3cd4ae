"""A run draws by cadence what was asked for, and a command draws it again from its checkpoint."""

import numpy as np
from PIL import Image

from tests.e2e import runner


def test_pictures_come_by_cadence_and_from_a_checkpoint(tmp_path):
    settings = {"total_steps": 2, "optim.warmup_steps": 1, "pictures.candidates": 12}
    settings |= {"pictures.kinds": "all", "pictures.images": 3}
    result = runner.train(tmp_path / "run", settings)
    assert result.code == 0, result.output
    names = ("attention", "neighbours", "norms", "pca", "reconstruction")
    drawn = tmp_path / "run" / "pictures"
    for name in names:
        for step in (0, 2):
            assert (drawn / f"{name}_{step:08d}.png").exists()

    command = ["tools/pictures.py", "--workdir", tmp_path / "run", "--output", tmp_path / "out"]
    flags = ["--images", "corpus:train", "--count", 3, "--candidates", 12]
    done = runner.python(*command, *flags)
    assert done.code == 0, done.output
    assert "run, step 2: 12 of " in done.output
    assert sorted(path.stem for path in (tmp_path / "out").iterdir()) == list(names)
    again = np.asarray(Image.open(tmp_path / "out" / "reconstruction.png"))
    assert (again == np.asarray(Image.open(drawn / "reconstruction_00000002.png"))).all()
