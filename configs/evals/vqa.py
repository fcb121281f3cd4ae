"""The 16 benchmarks of visual question answering, for runs of configs/vqa.py.

    webssl evaluate --model RUN --evals vqa:data=BENCHMARKS

Arguments: data = a folder with a folder for each benchmark, as it was downloaded, called as
docs/vqa.md calls the task (BENCHMARKS/mme); tasks = some of them, with + between; baselines = false
leaves out the model without images and with other images: a third of the work.
"""

from ml_collections import ConfigDict

from webssl_jax.config import ConfigError, parse_arg, suggest
from webssl_jax.evaluators.vqa.tasks import SIXTEEN, TASKS


def get_config(arg=None):
    """See the module's docstring."""
    arg = parse_arg(arg, data="benchmarks", tasks="", baselines=True)
    names = arg.tasks.split("+") if arg.tasks else [task.name for task in SIXTEEN]
    for name in names:
        if name not in TASKS:
            raise ConfigError(f"tasks: no benchmark {name!r}; {suggest(name, TASKS)}")
    rows = {}
    for name in names:
        rows[name] = {"kind": "vqa", "task": name, "data": f"{arg.data.rstrip('/')}/{name}"}
        rows[name]["baselines"] = arg.baselines
    return ConfigDict(rows)
