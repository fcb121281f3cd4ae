"""Model cards: what a folder of weights holds, how to load it, how its images are made."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from typing import Any

from webssl_jax.data.views import Preprocess
from webssl_jax.models.position import INTERPOLATIONS
from webssl_jax.models.sizes import ViTConfig
from webssl_jax.weights.families import FAMILIES, Family
from webssl_jax.weights.networks import Networks
from webssl_jax.weights.preprocessing import size_in_words
from webssl_jax.weights.tokenizer_files import has_tokenizer

_PIPELINE = """\
from transformers import pipeline

classify = pipeline("zero-shot-image-classification", model="{folder}")
labels = ["a painting of a ship", "a photo of a cat"]
scores = classify(image, candidate_labels=labels, hypothesis_template="{{}}")  # image: PIL, RGB
"""
_USAGE = {
    "ViTModel": """\
from transformers import AutoImageProcessor, ViTModel

processor = AutoImageProcessor.from_pretrained("{folder}")
model = ViTModel.from_pretrained("{folder}", add_pooling_layer=False)
inputs = processor(images=image, return_tensors="pt")  # image: PIL, RGB
tokens = model(**inputs).last_hidden_state  # (1, 1 + patches, {width}), CLS first, normalised
# Another size, sides multiples of {patch_size}: model(pixels, interpolate_pos_encoding=True)
""",
    "IJepaModel": """\
from transformers import AutoImageProcessor, IJepaModel

processor = AutoImageProcessor.from_pretrained("{folder}")
model = IJepaModel.from_pretrained("{folder}", add_pooling_layer=False)
inputs = processor(images=image, return_tensors="pt")  # image: PIL, RGB
tokens = model(**inputs).last_hidden_state  # (1, patches, {width}), normalised; there is no CLS
# Another size, sides multiples of {patch_size}: model(pixels, interpolate_pos_encoding=True)
""",
    "DINOv3ViTModel": """\
from transformers import AutoImageProcessor, DINOv3ViTModel

processor = AutoImageProcessor.from_pretrained("{folder}")
model = DINOv3ViTModel.from_pretrained("{folder}").eval()  # in training it moves positions
inputs = processor(images=image, return_tensors="pt")  # image: PIL, RGB
# (1, 1 + {registers} + patches, {width}): CLS, registers, patches; normalised
tokens = model(**inputs).last_hidden_state
# Another size: any sides that are multiples of {patch_size}
""",
    "Dinov2Model": """\
from transformers import AutoImageProcessor, Dinov2Model

processor = AutoImageProcessor.from_pretrained("{folder}")
model = Dinov2Model.from_pretrained("{folder}")
inputs = processor(images=image, return_tensors="pt")  # image: PIL, RGB
tokens = model(**inputs).last_hidden_state  # (1, 1 + patches, {width}), CLS first, normalised
# Another size: any sides that are multiples of {patch_size}
""",
    "Dinov2WithRegistersModel": """\
from transformers import AutoImageProcessor, Dinov2WithRegistersModel

processor = AutoImageProcessor.from_pretrained("{folder}")
model = Dinov2WithRegistersModel.from_pretrained("{folder}")
inputs = processor(images=image, return_tensors="pt")  # image: PIL, RGB
# (1, 1 + {registers} + patches, {width}): CLS, registers, patches; normalised
tokens = model(**inputs).last_hidden_state
# Another size: any sides that are multiples of {patch_size}
""",
    "ViTMAEForPreTraining": """\
from transformers import AutoImageProcessor, ViTMAEForPreTraining

processor = AutoImageProcessor.from_pretrained("{folder}")
model = ViTMAEForPreTraining.from_pretrained("{folder}")
inputs = processor(images=image, return_tensors="pt")  # image: PIL, RGB
output = model(**inputs)  # output.loss; output.logits (1, patches, pixels of a patch), output.mask
""",
    "CLIPModel": _PIPELINE,
    # Not the pipeline, which fills texts up to 64 tokens, whatever the model's context.
    "SiglipModel": """\
import torch
from transformers import AutoImageProcessor, AutoTokenizer, SiglipModel

model = SiglipModel.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
processor = AutoImageProcessor.from_pretrained("{folder}")
labels = ["a painting of a ship", "a photo of a cat"]
full = dict(padding="max_length", max_length={context}, truncation=True, return_tensors="pt")
inputs = processor(images=image, return_tensors="pt")  # image: PIL, RGB
logits = model(**tokenizer(labels, **full), **inputs).logits_per_image
scores = torch.sigmoid(logits)  # each label by itself
""",
    "SiglipVisionModel": """\
from transformers import AutoImageProcessor, SiglipVisionModel

processor = AutoImageProcessor.from_pretrained("{folder}")
model = SiglipVisionModel.from_pretrained("{folder}")
inputs = processor(images=image, return_tensors="pt")  # image: PIL, RGB
cls = model(**inputs).pooler_output  # (1, {width})
""",
    "CLIPVisionModel": """\
from transformers import AutoImageProcessor, CLIPVisionModel

processor = AutoImageProcessor.from_pretrained("{folder}")
model = CLIPVisionModel.from_pretrained("{folder}")
inputs = processor(images=image, return_tensors="pt")  # image: PIL, RGB
cls = model(**inputs).pooler_output  # (1, {width}), normalised
""",
    "open_clip.create_model_from_pretrained": """\
import open_clip

model, transform = open_clip.create_model_from_pretrained("local-dir:{folder}")
tokenizer = open_clip.get_tokenizer("local-dir:{folder}")
images = model.encode_image(transform(image)[None], normalize=True)  # image: PIL, RGB
texts = model.encode_text(tokenizer(["a painting of a ship", "a photo of a cat"]), normalize=True)
scores = (model.logit_scale.exp() * images @ texts.T).softmax(dim=-1)
""",
    "timm-siglip": """\
import timm

model = timm.create_model("local-dir:{folder}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
pooled = model(transform(image)[None])  # (1, {width}); image: PIL, RGB
# Another size, sides multiples of {patch_size}: create_model(..., dynamic_img_size=True)
""",
    "timm-ijepa": """\
import timm

model = timm.create_model("local-dir:{folder}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
pixels = transform(image)[None]  # image: PIL, RGB
tokens = model.forward_features(pixels)  # (1, patches, {width}), normalised; there is no CLS
# Another size, sides multiples of {patch_size}: create_model(..., dynamic_img_size=True)
""",
    "timm.create_model": """\
import timm

model = timm.create_model("local-dir:{folder}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
pixels = transform(image)[None]  # image: PIL, RGB
# (1, 1 + {registers} + patches, {width}): CLS, registers, patches; normalised
tokens = model.forward_features(pixels)
# Another size, sides multiples of {patch_size}: create_model(..., dynamic_img_size=True)
""",
}


@dataclasses.dataclass(frozen=True)
class Named:
    """How a card calls what it describes.

    place: what the example opens: a folder beside the reader, or ORGANISATION/NAME on the hub.
    licence: by the hub's name of it, as ``apache-2.0``; None where nobody has said it. link: where
      one lies that the hub does not know.
    """

    place: str
    licence: str | None = None
    link: str | None = None

    @classmethod
    def of(cls, folder: str | os.PathLike, licence: str | None = None) -> Named:
        """By the last part of a path: where it lies is of this machine."""
        return cls(pathlib.Path(folder).resolve().name, licence)


def card(networks: Networks, origin: Any, family: Family, dtype: str, named: Named) -> str:
    """README.md for weights of which no more is known than where they come from.

    origin: path and family of what they were converted from; see ``model.Origin``.
    """
    name = pathlib.Path(origin.path).name or "model"
    source = f" from `{name}`" + (f" (`{origin.family}`)" if origin.family else "")
    read = FAMILIES[origin.family].licence if origin.family else None
    if named.licence is None and read:
        named = dataclasses.replace(named, licence=read.name, link=read.link)
    return f"""\
{head(networks.kind.replace("encoder", "vit"), family, named)}
# {name}, converted

A vision transformer, converted by webssl_jax{source}; what it was trained on and its licence are
those of that file:
{network_and_use(networks, family, dtype, named)}"""


def head(tags: str, family: Family, named: Named) -> str:
    """The metadata at the top of a card."""
    texts = "text" in family.needs
    tag = "zero-shot-image-classification" if texts else "image-feature-extraction"
    licence = f"license: {named.licence}\n" if named.licence else ""
    if named.link:
        licence = f"license: other\nlicense_name: {named.licence}\nlicense_link: {named.link}\n"
    return f"""\
---
{licence}library_name: {family.library}
pipeline_tag: {tag}
tags: [vision, {tags}, webssl_jax]
---
"""


def network_and_use(networks: Networks, family: Family, dtype: str, named: Named) -> str:
    """The networks, an example of their use, and how images are made."""
    encoder, preprocess = networks.encoder, networks.preprocess
    assert encoder is not None and preprocess is not None  # heads alone have no card
    usage = _USAGE.get(family.name, _USAGE[family.opens]).format(
        folder=named.place,
        context=networks.text.context if networks.text else 0,
        width=encoder.width,
        patch_size=encoder.patch_size,
        registers=encoder.num_registers,
    )
    return f"""\
{encoder.depth} blocks of width {encoder.width}, {encoder.heads} heads,
patches of {encoder.patch_size} pixels, images of {size_in_words(encoder.image_size)} pixels.
{_texts(networks, family)}Weights: `{family.name}` ({family.opens}), {dtype}.

## Use

```python
{usage}```

{_images(preprocess, family)}
The folder's config files say the same. {_resize(encoder, family)}
"""


def _texts(networks: Networks, family: Family) -> str:
    """What there is to know about the text tower."""
    if "text" not in family.needs:
        return ""
    c = networks.text
    assert c is not None  # the family needs it
    ids = "the ids of CLIP's tokenizer, whose files are here"
    if not has_tokenizer(c.vocabulary):
        ids = f"{c.vocabulary:,} ids of a tokenizer that is not here"
    elif family.library != "transformers":
        ids = "the ids of CLIP's tokenizer"
    return f"""\
Texts: {c.depth} blocks of width {c.width}, {c.heads} heads, {c.context} tokens, {ids}.
In training texts were mended (ftfy), html-unescaped and lower-cased first; see
`webssl_jax.data.tokens.clean`. The space of images and texts has {c.embedding} channels.
"""


def _images(p: Preprocess, family: Family) -> str:
    """How images are made, and how its library's own differ."""
    how = f"to {p.shape[0]} x {p.shape[1]} pixels ({p.interpolation}), the aspect is not kept"
    if p.resize is not None:
        how = (
            f"shorter side to {p.resize} pixels ({p.interpolation}), central {p.size} x {p.size} "
            "pixels"
        )
    made = f"Images: {how},\nthen minus {list(p.mean)} and over {list(p.std)} per colour."
    if family.library == "transformers" and p.resize is not None:
        made += (
            "\nThe processor of transformers makes these pixels to one grey level. Where an odd "
            "number of\npixels is cut off along a side, it may cut one less before and one more "
            "behind than\ntorchvision's `CenterCrop`, as which the figures here were made: the "
            "image then moves by one pixel."
        )
    return made


def _resize(encoder: ViTConfig, family: Family) -> str:
    """What there is to know about other sizes."""
    theirs = family.resize_of(encoder.num_registers)
    ours, theirs = (INTERPOLATIONS[x].words for x in (encoder.position_resize, theirs))
    if encoder.position != "learned" or ours == theirs:
        return ""
    return (
        "At other sizes the features differ slightly from those of this training, as "
        f"{family.library} resizes positions {theirs} and the training {ours}."
    )
