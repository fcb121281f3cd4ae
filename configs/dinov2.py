"""DINOv2's own from-scratch recipes (dinov2/configs/train of its repository, over
ssl_default_config.yaml), so that a run can be held against its published figures.

    python -m webssl_jax.train --config configs/dinov2.py:recipe=vitl16_short --workdir RUN \
        --config.data.train='SHARDS/train-*.arrayrecord'

Argument: recipe =

  vitl16_short  ViT-L/16 with a GELU MLP, ImageNet-1k: batch 2048, 125,000 steps, one head of 65,536
                prototypes for CLS and patches, softmax centring, layer decay 0.9
  vitl14        ViT-L/14 with SwiGLU, ImageNet-22k: batch 3072, 625,000 steps, two heads of 131,072
                prototypes, Sinkhorn
  vitg14        ViT-g/14 (1,536 wide, 40 deep): as vitl14, in groups of 12 images instead of 32

Sources: every number is from the three files and the defaults under them. Batches are those of the
README's commands (32 GPUs x 64 and 96 x 32) and for vitg14 of the paper's table 16 (arXiv
2304.07193); groups of images are what one GPU had. Rates are per 1,024 images and scale with the
square root: 5.66e-3 and 3.46e-4. Blur is as their code ran (see web_dino.py). bfloat16 stands for
their float16.

Hardware: not run on real chips with this code. Parameters, teacher and Adam's moments, in float32
and computed from the shapes, take 4.9 GiB (vitl16_short), 6.0 (vitl14) and 18.4 (vitg14), divided
by the chips of ``sharding.fsdp``. The first lines of a run say what the compiled step needs.

Expected figures: theirs, the goal of a full run and not results of this code. ImageNet-1k top-1 of
the teacher, from the README:

                 k-NN   linear
  vitl16_short   81.6     82.9
  vitl14         82.0     84.5

It has none for vitg14 on ImageNet-22k; the released ViT-g/14 (83.5, 86.5) saw LVD-142M. A network
that knows nothing starts near a DINO loss of ln K (11.09 for 65,536 prototypes, 11.78 for 131,072)
and an iBOT loss of half of that. Their log shows half of our iBOT and KoLeo terms.
"""

from webssl_jax.config import ConfigError, parse_arg, suggest

from .web_dino import vitg14

RECIPES = ("vitl16_short", "vitl14", "vitg14")


def get_config(arg=None):
    """See the module's docstring."""
    arg = parse_arg(arg, recipe="vitl16_short")
    if arg.recipe not in RECIPES:
        raise ConfigError(f"config argument recipe={arg.recipe}: {suggest(arg.recipe, RECIPES)}")
    config = vitg14(
        "1b" if arg.recipe == "vitg14" else "300m"
    )  # Web-DINO's sizes have these shapes
    config.name = f"dinov2_{arg.recipe}"
    method, optim = config.method, config.optim
    if arg.recipe == "vitl14":
        method.group_images = 32
    if arg.recipe == "vitl16_short":
        config.global_batch = 2048
        config.total_images = 125_000 * 2048
        config.model.update({"patch_size": 16, "mlp": "gelu", "drop_path": 0.3})
        method.group_images = 64
        method.view.local_size = 96
        method.dino_head.update({"prototypes": 65_536, "bottleneck": 256})
        method.ibot_head = None  # the DINO head serves both
        method.centering = "softmax"
        method.momentum = 0.992
        method.layer_decay = 0.9
        method.teacher_temperature_warmup_images = 37_500 * 2048
        method.freeze_last_layer_images = 1_250 * 2048
        optim.lr = 4e-3
        optim.warmup_images = 12_500 * 2048
        optim.final_weight_decay = 0.4
    return config
