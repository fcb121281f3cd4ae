"""Visual question answering as Cambrian-1 trains it and Web-SSL measures its encoders by it (ICCV
2025, section 2.3 and table 5): a frozen encoder, a connector, Llama 3 8B Instruct.

    python -m webssl_jax.train --config configs/vqa.py:stage=1,encoder=web_dino_1b --workdir RUN1 \
        --config.data.train='ALIGNMENT/train-*.arrayrecord' --config.init_from=ENCODER,LLAMA \
        --config.method.dialogue.tokenizer=LLAMA
    python -m webssl_jax.train --config configs/vqa.py:stage=2,encoder=web_dino_1b --workdir RUN2 \
        --config.data.train='CAMBRIAN7M/train-*.arrayrecord' --config.init_from=RUN1 \
        --config.method.dialogue.tokenizer=LLAMA

ENCODER is a run, or a weight file or folder of any family; LLAMA a folder of transformers.
docs/vqa.md goes from the public data to a table.

Arguments, with commas between:

  stage     1: the connector learns. 2: the connector and the language model
  encoder   web_dino_1b, web_mae_1b, clip_1b, siglip_b16, ..., as webssl_jax.list_models() has them
  language  llama-3-8b, or another of webssl_jax/language/sizes.py
  res       pixels a side of images: 224 when left out
  images    conversations seen, instead of one pass: 2.5 million in stage 1, 7 million in stage 2
  preset    v4, v5e, v5p, v6e: sharding and remat for them (common.py)

Sources: Cambrian-1 (arXiv 2406.16860) and its scripts: batch 512, AdamW (0.9, 0.999), no decay,
clipping to norm 1, cosine to 0 after a warm-up of 6% (stage 1) and 3% (stage 2), 2,048 tokens,
Llama 3's template without a blank line, its system text, GELU connector over 24 x 24 tokens, the
square root rule for other batches. The rate of stage 2, 4e-5, is in both.

Known difference between the sources: the paper's table 5 has 1e-5 for stage 1, the scripts have
1e-3 for the connector at the same batch. Taken is 1e-3; ``--config.optim.lr=1e-5`` is the paper's.
Open in the paper: newline tokens and hidden padding (here off: ``--config.method.connector.newline
=true``, ``--config.method.dialogue.unpad=true``), and how many conversations were left without
LAION's images.

Known differences of this code: batches are drawn at random in both stages, where Cambrian groups
conversations of like length in stage 2. The last layer's tokens after the final norm are taken of
every encoder; Cambrian's code takes the last but one, unnormed, of CLIP:
``--config.method.connector.block=-2 --config.method.connector.norm=false``.

Hardware: not run on chips with this code. Expected figures: tables 6 to 15 of the paper, the goal
of a full run and not results of this code; encoders of 1B have an average of about 49 to 52.
"""

from dataclasses import fields

from webssl_jax.config import ConfigError, parse_arg
from webssl_jax.language.dialogue import CAMBRIAN_SYSTEM
from webssl_jax.language.sizes import DecoderConfig
from webssl_jax.models.connector import ConnectorConfig

from .common import apply_preset, base, vit

# What the language model keeps of each block for the backward pass, by preset: as memory allows.
_KEPT = {"v5e": "most", "v5p": "named", "v5p-512": "named", "2xv5p-256": "named"}


def get_config(arg=None):
    """See the module's docstring."""
    arg = parse_arg(
        arg, stage=1, encoder="web_dino_1b", language="llama-3-8b", res=224, images=0, preset=""
    )
    if arg.stage not in (1, 2):
        raise ConfigError(f"config argument stage={arg.stage}: there are 1 and 2")
    config = base()
    config.name = f"vqa_stage{arg.stage}_{arg.encoder}"
    config.global_batch = 512
    config.total_images = arg.images or {1: 2_500_000, 2: 7_000_000}[arg.stage]
    config.model = vit(arg.encoder, dtype="bfloat16", remat="none")
    config.method = vqa(arg.stage, arg.language, arg.res)
    config.optim.lr = {1: 1e-3, 2: 4e-5}[arg.stage]
    config.optim.lr_batch = 512
    config.optim.lr_scaling = "sqrt"
    del config.optim.warmup_images
    config.optim.warmup_percent = {1: 6.0, 2: 3.0}[arg.stage]
    config.optim.weight_decay = 0.0
    config.optim.b2 = 0.999
    config.optim.clip = "global"
    apply_preset(config, arg.preset)
    if arg.preset:
        kept = _KEPT.get(arg.preset, "full")
        config.method.language.update({"attention": "pallas", "remat": kept})
    return config


def vqa(stage: int, language: str, res: int) -> dict:
    """The method's keys; see VQA in webssl_jax/methods/vqa/method.py."""
    return {
        "name": "vqa",
        "trained": ("connector",) if stage == 1 else ("connector", "language"),
        "image_size": res,
        "length": 2048,  # tokens, the image's cells included
        "block": 256,  # tokens of each text whose logits exist at a time; 0 = all
        # None stands for what belongs to the size
        "language": {"size": language}
        | {field.name: None for field in fields(DecoderConfig)}
        | {"dtype": "bfloat16", "remat": "full"},
        "connector": {field.name: None for field in fields(ConnectorConfig)},
        "dialogue": {
            "tokenizer": "",  # a folder of transformers, a .gguf file, or smollm2
            "template": "cambrian",
            "system": CAMBRIAN_SYSTEM,
            "unpad": False,
        },
    }
