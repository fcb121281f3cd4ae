"""tools/bench_checkpoint.py on the smallest state there is."""

import re
import subprocess
import sys

from tests.e2e.runner import MICRO, ROOT, environment

NAME = "plain copy|(?:local )?(?:blocking|finished|restore)"
LINE = re.compile(rf"^({NAME}) +([\d.]+)(?: +([\d,]+))?$", re.M)


def test_every_time_is_measured_and_nothing_is_left_behind(tmp_path):
    config = [
        f"--config.{key}={MICRO[key]}" for key in MICRO if key.startswith(("model", "method"))
    ]
    command = [sys.executable, str(ROOT / "tools" / "bench_checkpoint.py"), *config]
    command += ["--config=configs/web_mae.py:size=tiny", "--config.global_batch=16"]
    command += ["--config.optim.warmup_images=0", "--config.sharding.max_unsharded_fraction=1.0"]
    done = subprocess.run(
        [*command, "--rounds=1", "--devices=2", f"--workdir={tmp_path}"],
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    times = {name: float(seconds) for name, seconds, _ in LINE.findall(done.stdout)}
    kinds = ["blocking", "finished", "restore"]
    assert list(times) == ["plain copy", *kinds, *(f"local {kind}" for kind in kinds)]
    for way in ("", "local "):
        assert 0 < times[f"{way}blocking"] <= times[f"{way}finished"]
    assert done.stdout.count(" / ") == 4
    assert "over 2 device(s)" in done.stderr and not list(tmp_path.iterdir())
