"""The sixteen benchmarks of the paper, each with Cambrian's question and rule (Tong et al., 2024).

A benchmark is one file here and a row below.
"""

from __future__ import annotations

from webssl_jax.errors import UserError, suggest
from webssl_jax.evaluators.vqa.task import Task
from webssl_jax.evaluators.vqa.tasks.ai2d import AI2D
from webssl_jax.evaluators.vqa.tasks.chartqa import ChartQA
from webssl_jax.evaluators.vqa.tasks.cv_bench import CVBench2D, CVBench3D
from webssl_jax.evaluators.vqa.tasks.docvqa import DocVQA
from webssl_jax.evaluators.vqa.tasks.gqa import GQA
from webssl_jax.evaluators.vqa.tasks.mathvista import MathVista
from webssl_jax.evaluators.vqa.tasks.mmbench import MMBench
from webssl_jax.evaluators.vqa.tasks.mme import MME
from webssl_jax.evaluators.vqa.tasks.mmmu import MMMU
from webssl_jax.evaluators.vqa.tasks.mmvp import MMVP
from webssl_jax.evaluators.vqa.tasks.ocrbench import OCRBench
from webssl_jax.evaluators.vqa.tasks.realworldqa import RealWorldQA
from webssl_jax.evaluators.vqa.tasks.scienceqa import ScienceQA
from webssl_jax.evaluators.vqa.tasks.seed import SEED
from webssl_jax.evaluators.vqa.tasks.textvqa import TextVQA

# In the order of the paper's tables: four a category.
SIXTEEN: tuple[Task, ...] = (
    *(MME(), MMBench(), SEED(), GQA()),
    *(ScienceQA(), MMMU(), MathVista(), AI2D()),
    *(ChartQA(), OCRBench(), TextVQA(), DocVQA()),
    *(MMVP(), RealWorldQA(), CVBench2D(), CVBench3D()),
)
_ON_SERVERS: tuple[Task, ...] = (MMBench("test"), DocVQA("test"))
TASKS: dict[str, Task] = {task.name: task for task in (*SIXTEEN, *_ON_SERVERS)}


def task(name: str) -> Task:
    """The benchmark of a name.

    Raises:
      UserError: if there is none; the message has the nearest.
    """
    if name not in TASKS:
        raise UserError(f"no benchmark {name}: {suggest(name, TASKS)}")
    return TASKS[name]
