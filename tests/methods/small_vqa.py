"""A small method of visual question answering, with the tokenizer of the golden vectors: each byte
a token, and Llama 3's special ones."""

import functools
import io
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from ml_collections import ConfigDict
from PIL import Image

from webssl_jax import methods, params
from webssl_jax.data import annotations, records

SPEC = "configs/vqa.py:stage=2,encoder=web_dino_micro"
GOLDEN = pathlib.Path(__file__).parent / "golden"
VOCABULARY = 272  # 265 ids of the tokenizer
DECODER = dict(width=32, depth=2, heads=4, kv_heads=2, mlp_hidden=48, context=1024)
# Llama 3's own: with a blank line after a role
TEMPLATE = (
    "{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)


@functools.cache
def tokenizer_folder(parent: pathlib.Path) -> pathlib.Path:
    """A folder with that tokenizer and Llama 3's own template."""
    folder = parent / "tokenizer"
    folder.mkdir()
    shutil.copy(GOLDEN / "m_tokenizer_plain.json", folder / "tokenizer.json")
    config = {"eos_token": "<|eot_id|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def make(folder, trained=("connector",), size="web_dino_micro", **method):
    """The method. folder: of its tokenizer. size: of the encoder."""
    method = {
        "name": "vqa",
        "trained": trained,
        "image_size": 32,
        "length": 48,
        "block": 0,
        "language": DECODER | {"vocabulary": VOCABULARY},
        "connector": {"grid": 3, "newline": True},
        "dialogue": {"tokenizer": str(folder), "unpad": True},
    } | method
    return methods.create(ConfigDict({"model": {"size": size}, "method": method}))


def fresh(method, seed=0):
    """Random parameters of its shapes, none of them zero or one: nothing is compiled."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(method.init, jax.random.key(0), method.batch_spec(2)).params

    def draw(path, leaf):
        values = rng.normal(size=leaf.shape).astype(np.float32)
        return jnp.asarray(values * 0.05 + path.endswith("scale"))

    return params.map_with_path(draw, shapes)


def settings(folder):
    """{key: value} that make the config of SPEC as small. folder: of its tokenizer."""
    language = DECODER | {"vocabulary": VOCABULARY, "dtype": "float32", "remat": "none"}
    return {
        **{f"method.language.{key}": value for key, value in language.items()},
        **{"method.image_size": 32, "method.length": 48, "method.block": 8},
        **{"method.connector.grid": 3, "method.dialogue.tokenizer": folder},
        **{"method.dialogue.system": "", "model.dtype": "float32"},
    }


def talk(words="A cat."):
    """Annotations of a record."""
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": words}]
    return {"conversations": annotations.encode_json(turns)}


def write_talks(file, count):
    """A shard of conversations about pictures."""
    rng = np.random.default_rng(0)
    writer = ArrayRecordWriter(str(file), records.WRITER_OPTIONS)
    for i in range(count):
        stream = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8)).save(stream, "PNG")
        data, said = stream.getvalue(), talk("A cat." if i % 2 else "Two dogs.")
        writer.write(
            records.encode(records.Record(data, (), str(i), 30, 20, "s", annotations=said))
        )
    writer.close()
