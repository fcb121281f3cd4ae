"""Weight files of any size that take no room: holes where numbers would be, which read as zeros."""

import json
import math
import struct

import jax
import ml_dtypes

from webssl_jax.methods.mae.method import MAE, View
from webssl_jax.weights import tables
from webssl_jax.weights.families import FAMILIES


def write(folder, encoder):
    """A folder of hf-vit in bfloat16 whose weights are zeros and whose positions are true. Returns
    the bytes of its tensors."""
    family = FAMILIES["hf-vit"]
    method = MAE(encoder, encoder, view=View(image_size=encoder.image_size))
    shapes = jax.eval_shape(lambda: method.init(jax.random.key(0), method.batch_spec(1))).params
    header, end, constants = {}, 0, []
    for tensor in tables.layout(family.table(method), shapes):
        size = 2 * math.prod(tensor.shape)
        header[tensor.key] = dict(dtype="BF16", shape=tensor.shape, data_offsets=(end, end + size))
        if isinstance(tensor.row, tables.Constant):
            constants.append((end, tensor.row.value().astype(ml_dtypes.bfloat16)))
        end += size
    text = json.dumps(header).encode()
    folder.mkdir()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
        for offset, array in constants:
            file.seek(8 + len(text) + offset)
            file.write(array.tobytes())
    (folder / "config.json").write_text(json.dumps(family.config(method)))
    return end
