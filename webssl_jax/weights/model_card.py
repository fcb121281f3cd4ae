"""The model card of an exported run: what it is, how to load it, and the run's figures with what
each means."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from webssl_jax import config as config_lib
from webssl_jax.evaluators.frozen import Measurement
from webssl_jax.evaluators.report import report
from webssl_jax.evaluators.results import read_result
from webssl_jax.models.position import INTERPOLATIONS
from webssl_jax.models.sizes import ViTConfig
from webssl_jax.telemetry.writer import read_rows
from webssl_jax.weights.families import Family
from webssl_jax.weights.tokenizer_files import has_tokenizer

# The first row whose key is the figure's name, or its beginning, explains it.
_MEANINGS = (
    (
        "train/loss",
        "training loss of one batch; for MAE the mean squared error of the hidden patches, in "
        "units of each patch's own variance when `norm_pix_loss` is on (1.0 = predicting the "
        "patch's mean); for DINO the sum of cross-entropies in nats between what student and "
        "teacher make of an image's crops, which start near the logarithm of the number of "
        "prototypes; for CLIP the contrast of each image's own caption with all others of the "
        "batch, which starts near the logarithm of the batch (near 10 or 11 with SigLIP's sigmoid)",
    ),
    (
        "eval/knn/top1",
        "share of test images whose class the most similar training images vote for; "
        "nothing is learned on top of the frozen features",
    ),
    (
        "eval/linear/top1",
        "share of test images put into the right class by one linear layer trained on the frozen "
        "features",
    ),
    (
        "eval/zero_shot/",
        "share of test images put into the right class by its name in words, or with it among the "
        "first five; nothing is learned from labels",
    ),
    (
        "eval/retrieval/",
        "share of images (texts) with one of their own texts (images) among the k closest of all",
    ),
    ("eval/", "evaluation of the frozen features, see webssl_jax/evaluators"),
)
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
    "SiglipModel": _PIPELINE,
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


def model_card(run: Any, family: Family, dtype: str, folder: str) -> str:
    """README.md for a folder of ``family``.

    Args:
      run: a :class:`~webssl_jax.runs.Run`.
      folder: the path to print in the example.
    """
    method, teacher = run.method, run.variables.teacher
    texts = hasattr(method, "text")
    workdir = pathlib.Path(run.workdir)
    figures = figures_table(read_rows(workdir / "metrics.jsonl"), run.step)
    resolved = json.dumps(config_lib.resolved(run.config), indent=2, sort_keys=True)
    name = run.config.get("name") or "webssl_jax"
    return f"""\
{_head(f"{'image-text' if texts else 'self-supervised'}, {type(method).__name__.lower()}", family)}
# {name}, step {run.step:,}

A vision transformer trained {"on images with captions" if texts else "without labels"} by \
webssl_jax ({type(method).__name__}{
        "; these are the weights of the teacher, the student's running average" if teacher else ""
    }){", and its text tower" if "text" in family.needs else ""}:
{_network_and_use(method, family, dtype, folder)}
## Figures of this run

{figures}

{evaluation(workdir, run.step)}

## How it was made

- step {run.step:,} of {config_lib.total_steps(run.config):,}
- images a step: {run.config.global_batch:,}
- training images: `{run.config.data.train}`
- git revision of the training code: {_training_revision(workdir)}
- git revision of the exporting code: {config_lib.git_revision()}

<details><summary>Resolved config</summary>

```json
{resolved}
```

</details>
"""


def imported_card(loaded: Any, family: Family, dtype: str, folder: str) -> str:
    """README.md for weights (:class:`~webssl_jax.weights.load.Loaded`) that were only converted."""
    return f"""\
{_head(loaded.kind.replace("encoder", "vit"), family)}
# {pathlib.Path(loaded.source).name}, converted

A vision transformer, converted by webssl_jax from `{loaded.source}` (`{loaded.family}`,
{loaded.dtype}); what it was trained on and its licence are those of that file:
{_network_and_use(loaded.networks, family, dtype, folder)}"""


def _head(tags: str, family: Family) -> str:
    texts = "text" in family.needs
    tag = "zero-shot-image-classification" if texts else "image-feature-extraction"
    return f"""\
---
library_name: {family.library}
pipeline_tag: {tag}
tags: [vision, {tags}, webssl_jax]
---
"""


def _network_and_use(method: Any, family: Family, dtype: str, folder: str) -> str:
    encoder, view = method.encoder, method.eval_view()
    usage = _USAGE[family.opens].format(
        folder=folder,
        width=encoder.width,
        patch_size=encoder.patch_size,
        registers=encoder.num_registers,
    )
    return f"""\
{encoder.depth} blocks of width {encoder.width}, {encoder.heads} heads,
patches of {encoder.patch_size} pixels, images of {encoder.image_size} pixels.
{_texts(method, family)}Weights: `{family.name}` ({family.opens}), {dtype}.

## Use

```python
{usage}```

Images: shorter side to {view.resize} pixels (bicubic), central {view.size} x {view.size} pixels,
then minus {list(method.mean)} and over {list(method.std)} per colour.
The folder's config files say the same. {_resize(encoder, family)}
"""


def _texts(method: Any, family: Family) -> str:
    """What there is to know about the text tower."""
    if "text" not in family.needs:
        return ""
    c = method.text
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


def _resize(encoder: ViTConfig, family: Family) -> str:
    """What there is to know about other sizes."""
    ours, theirs = (INTERPOLATIONS[mode].words for mode in (encoder.position_resize, family.resize))
    if encoder.position == "sincos" or ours == theirs:
        return ""
    return (
        "At other sizes the features differ slightly from those of this training, as "
        f"{family.library} resizes positions {theirs} and the training {ours}."
    )


def figures_table(rows: Sequence[Mapping[str, float]], step: int) -> str:
    """A Markdown table of the last figure of each kind up to ``step``, beside the first one, with
    its meaning.

    Figures are the training loss, and what has a standard error of its own (``NAME_se``) among
    ``eval/...``. The variants from which an evaluator chose are left out: the best of them is not
    an estimate.
    """
    first: dict[str, tuple[float, str]] = {}
    last: dict[str, tuple[float, str]] = {}
    for row in rows:
        if row["step"] > step:
            continue
        for name, value in row.items():
            spread = row.get(f"{name}_se")
            if name != "train/loss" and (spread is None or not name.startswith("eval/")):
                continue
            text = f"{value:.4f}" if spread is None else f"{value:.3f} ± {spread:.3f}"
            last[name] = (row["step"], text)
            first.setdefault(name, last[name])
    if not last:
        return "This run logged no figures up to this step."
    lines = ["| figure | first (step) | last (step) | what it means |", "|---|---|---|---|"]
    for name in sorted(last, key=lambda n: (not n.startswith("eval/"), n)):
        meaning = next(text for start, text in (*_MEANINGS, ("", "")) if name.startswith(start))
        cells = [f"{text} ({at:,})" for at, text in (first[name], last[name])]
        lines.append(f"| `{name}` | {cells[0]} | {cells[1]} | {meaning} |")
    lines += [
        "",
        "± is one standard error over the test images (or texts). The first figure at step 0 is "
        "the untrained network: what training added is the difference to it. They come from the "
        "run's `metrics.jsonl`.",
    ]
    return "\n".join(lines)


def evaluation(workdir: pathlib.Path, step: int) -> str:
    """The newest evaluation up to ``step`` beside trivial features and step 0, as a code block."""
    folder = workdir / "eval"
    done = sorted(p for p in folder.glob("[0-9]*.json") if int(p.stem) <= step)
    if not done:
        return (
            "This run was not evaluated up to this step (`python -m webssl_jax.evaluate` does it)."
        )
    result, trivial = read_result(done[-1]), folder / "baselines.json"
    baselines = {  # a run measured by texts alone has none
        name: Measurement.from_json(row)
        for name, row in (json.loads(trivial.read_text()) if trivial.exists() else {}).items()
    }
    step0 = read_result(done[0]) if int(done[0].stem) == 0 and result.step else None
    heading = f"Evaluation at step {result.step:,}, beside what needs no training:"
    return f"{heading}\n\n```\n{report(result, baselines, step0)}\n```"


def _training_revision(workdir: pathlib.Path) -> str:
    path = workdir / "environment.json"
    if not path.exists():
        return "not recorded"
    return json.loads(path.read_text()).get("git_revision", "not recorded")
