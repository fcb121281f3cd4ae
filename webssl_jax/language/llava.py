"""A model that answers questions about images, for transformers' ``LlavaForConditionalGeneration``.

Its code reads the tokens of an image tower before the tower's final norm, as many as there are
patches, through two linear layers, and puts them where ``<image>`` stands. What a model has besides
is refused.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import shutil
from typing import Any

import numpy as np

from webssl_jax.data.turns import IMAGE
from webssl_jax.language import hf, tokenizer
from webssl_jax.weights import families, safetensors_io, tables
from webssl_jax.weights.networks import Networks, encoder_of
from webssl_jax.weights.stored import WeightsError
from webssl_jax.weights.tables import LINEAR, SAME, Row, Table, Transform, linear

FORMAT = "hf-llava"
TOWERS = ("hf-dinov2", "hf-clip-vision", "hf-siglip-vision", "hf-vit")  # families it may have
_BICUBIC = 3  # of Pillow


def write_folder(
    folder: str | os.PathLike,
    networks: Networks,
    params: Any,
    dtype: str = "float32",
    max_file_bytes: int = safetensors_io.MAX_FILE_BYTES,
) -> pathlib.Path:
    """Writes weights, configs, tokenizer and a README. The result appears whole or not at all.

    networks: with encoder, connector, language model and dialogue. params: of all three.

    Raises:
      WeightsError: for what its code cannot compute, a value that is not finite, or a folder that
        is not empty or cannot be written.
    """
    folder = pathlib.Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise WeightsError(f"{folder}: is not empty; name a new folder")
    _check(networks)
    tower = _tower(networks, params)
    speaker, image_id = _tokenizer(networks)
    table = _table(networks, families.table_of(tower, networks), image_id)
    specs = [
        safetensors_io.Spec(tensor.key, tensor.shape, dtype)
        for tensor in tables.layout(table, params)
    ]
    texts = {
        "config.json": _config(networks, tower, image_id, dtype),
        "preprocessor_config.json": _images(networks),
        "processor_config.json": _processor(networks),
    }
    staging = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        staging.mkdir(parents=True)
        safetensors_io.write_folder(staging, specs, tables.export(params, table), max_file_bytes)
        tokenizer.write_folder(speaker, staging)
        for name, values in texts.items():
            safetensors_io.write_text(staging / name, json.dumps(values, indent=2) + "\n")
        safetensors_io.write_text(staging / "README.md", _readme(networks))
        os.replace(staging, folder)
    except OSError as error:
        raise WeightsError(f"cannot write {folder}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder


def _check(networks: Networks) -> None:
    """Raises WeightsError naming all that its code has not."""
    connector, dialogue, preprocess = networks.connector, networks.dialogue, networks.preprocess
    if not (connector and networks.language and dialogue and preprocess):
        raise WeightsError(f"{FORMAT}: needs a language model; give a run of configs/vqa.py")
    encoder = encoder_of(networks)
    grid = encoder.grid_of(*preprocess.shape)
    problems = {
        f"resizes no patches: grid = {connector.grid} for {grid[0]} x {grid[1]} of them": (
            (connector.grid, connector.grid) != grid
        ),
        "has no newlines: newline = True": connector.newline,
        "reads before the final norm: norm = True": connector.norm,
        "hides no padding: dialogue.unpad = True": dialogue.unpad,
        f"fits no positions: made for {encoder.image_size} pixels": encoder.grid != grid,
    }
    found = [words for words, holds in problems.items() if holds]
    if found:
        raise WeightsError(f"{FORMAT}: its code {', and '.join(found)}; train without it")


def _tower(networks: Networks, params: Any) -> str:
    """The family whose code computes the encoder."""
    encoder = {"encoder": params["encoder"]}
    for name in TOWERS:
        try:
            tables.layout(families.table_of(name, networks), encoder)
            _tower_config(name, networks)
        except WeightsError:
            continue
        return name
    raise WeightsError(
        f"{FORMAT}: none of its image towers computes this encoder ({', '.join(TOWERS)})"
    )


def _tower_config(name: str, networks: Networks) -> dict[str, Any]:
    make = families.FAMILIES[name].config
    assert make is not None  # those of TOWERS are folders
    return {key: value for key, value in make(networks).items() if key != "architectures"}


def _tokenizer(networks: Networks) -> tuple[tokenizer.Tokenizer, int]:
    """That of the dialogue with ``<image>`` as a token, and its id."""
    import tokenizers

    assert networks.dialogue is not None  # of _check
    speaker = networks.dialogue.speaker
    inner = tokenizers.Tokenizer.from_str(speaker.inner.to_str())
    inner.add_special_tokens([tokenizers.AddedToken(IMAGE, normalized=False)])
    image_id = inner.token_to_id(IMAGE)
    assert image_id is not None  # it was added
    return dataclasses.replace(speaker, inner=inner), image_id


def _table(networks: Networks, tower: Table, image_id: int) -> Table:
    language = networks.language
    assert language is not None  # of _check
    more = max(0, image_id + 1 - language.vocabulary)  # rows of zeros; nothing looks them up
    rows = [
        *(dataclasses.replace(row, theirs=f"vision_tower.{row.theirs}") for row in tower.rows),
        *linear("connector/fc1", "multi_modal_projector.linear_1"),
        *linear("connector/fc2", "multi_modal_projector.linear_2"),
    ]
    for row in hf.table(language).rows:
        assert isinstance(row.ours, str)  # a decoder has no fused tensors
        of_words = row.ours in ("token_embed", "lm_head/kernel")
        transform = _wider(row.transform, more) if of_words else row.transform
        rows.append(Row(f"language/{row.ours}", f"language_model.{row.theirs}", transform))
    constants = (
        dataclasses.replace(one, theirs=f"vision_tower.{one.theirs}") for one in tower.constants
    )
    return Table(FORMAT, tuple(rows), tuple(constants))


def _wider(transform: Transform, more: int) -> Transform:
    assert transform in (SAME, LINEAR)
    return Transform(
        lambda x: np.pad(transform.to_theirs(x), ((0, more), (0, 0))),
        lambda x: transform.to_ours(x[: len(x) - more]),
    )


def _config(networks: Networks, tower: str, image_id: int, dtype: str) -> dict[str, Any]:
    language, connector = networks.language, networks.connector
    assert language and connector  # of _check
    words = dataclasses.replace(language, vocabulary=max(language.vocabulary, image_id + 1))
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "dtype": dtype,
        "vision_config": _tower_config(tower, networks),
        "text_config": hf.write_config(words, dtype),
        "image_token_index": image_id,
        "image_seq_length": connector.cells,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": connector.block,
        "vision_feature_select_strategy": _strategy(networks),
        "tie_word_embeddings": language.tied_head,
    }


def _strategy(networks: Networks) -> str:
    """``default`` leaves out the first token, CLS."""
    return "default" if encoder_of(networks).pooling == "cls" else "full"


def _processor(networks: Networks) -> dict[str, Any]:
    strategy = _strategy(networks)
    return {
        "processor_class": "LlavaProcessor",
        "patch_size": encoder_of(networks).patch_size,
        "vision_feature_select_strategy": strategy,
        "num_additional_image_tokens": int(strategy == "default"),
        "image_token": IMAGE,
    }


def _images(networks: Networks) -> dict[str, Any]:
    """Padded to a square of the mean colour, then resized."""
    preprocess = networks.preprocess
    assert preprocess is not None  # of _check
    height, width = preprocess.shape
    return {
        "image_processor_type": "LlavaImageProcessor",
        "processor_class": "LlavaProcessor",
        "do_pad": True,
        "do_resize": True,
        "size": {"shortest_edge": height},
        "resample": _BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess.mean),
        "image_std": list(preprocess.std),
        "do_convert_rgb": True,
    }


def _readme(networks: Networks) -> str:
    dialogue = networks.dialogue
    assert dialogue is not None  # of _check
    system = f'{{"role": "system", "content": {json.dumps(dialogue.system)}}}, '
    return f"""\
---
library_name: transformers
pipeline_tag: image-text-to-text
---
A model that answers questions about images, trained by webssl_jax (configs/vqa.py).

```python
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

folder = "."
processor = AutoProcessor.from_pretrained(folder)
model = LlavaForConditionalGeneration.from_pretrained(folder)
question = {{"role": "user", "content": "{IMAGE}\\nWhat is this?"}}
messages = [{system if dialogue.system else ""}question]
text = processor.tokenizer.apply_chat_template(
    messages, tokenize=False, add_generation_prompt=True
)
inputs = processor(
    text=text, images=Image.open("picture.jpg"), return_tensors="pt", add_special_tokens=False
)
answer = model.generate(**inputs, max_new_tokens=64, do_sample=False)
print(processor.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```
"""
