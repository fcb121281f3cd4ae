"""DINOv3 (Siméoni et al., arXiv 2508.10104): stage 1, the Gram stage and the stage of high
resolution, on web images.

    python -m webssl_jax.train --config configs/dinov3.py:size=7b --workdir RUN \
        --config.data.train='SHARDS/train-*.arrayrecord'
    python -m webssl_jax.train --config configs/dinov3.py:size=7b,stage=gram --workdir RUN2 \
        --config.continue_from=RUN --config.method.gram.teacher=EARLIER_RUN \
        --config.data.train='SHARDS/train-*.arrayrecord'
    python -m webssl_jax.train --config configs/dinov3.py:size=7b,stage=high_res --workdir RUN3 \
        --config.continue_from=RUN2 --config.data.train='SHARDS/train-*.arrayrecord'

Arguments: size = s, b, l, splus, lplus, hplus (these with gated MLPs), 7b or tiny; stage = 1, gram
or high_res; recipe = web or imagenet (the published ViT-L on ImageNet-1k; size l, stage 1); preset
as in web_mae.py.

The Gram stage goes on with the state of stage 1, Adam's moments and the step included: its
schedules count from the start of stage 1, whose length it must be told where it differs
(``method.gram.refresh_images``). ``method.gram.teacher`` is an earlier run, or weights, whose
encoder the Gram teacher begins as; the paper takes stage 1 at 200,000 steps. Without it the stage's
first teacher is taken. Started without ``continue_from`` it only repeats stage 1, and says so.

The stage of high resolution goes on with the state of the Gram stage, 30,000 steps of 2,048 images.
Each batch takes one set of crop sizes (``method.crop_sizes``), drawn by the published shares, so a
step is compiled for each. The Gram teacher is the teacher of its first step, and stays.

Sources: numbers of 7b and imagenet are those of the published configs and of the paper: batch 4096,
1,000,000 steps and 200,000 more, rates 5e-5 and 3e-5 times 4 sqrt(batch / 1024), warm-up 100,000
steps and then constant, decay 0.04, momentum 0.994 and 0.999, teacher temperature 0.04 to 0.07 in
the warm-up, layer decay 0.98, drop path 0.4, clipping at 30, prototypes 262,144 and 98,304 without
weight norm, crops of 256 and 112 pixels without flips, rope rescaled by up to 2 in training, four
registers, Gram loss of weight 2 on crops of 512. Keys of the ImageNet ViT-L have biases, those of
the others none. High resolution: global crops of 512 and 768 pixels, local ones of 112 to 336, Gram
crops of one and a half times the global, Gram weight 1.5, a rate of 1.25e-5 times
4 sqrt(batch / 1024), teacher temperature 0.07.

Assumptions and differences: the sizes below 7b, which were distilled from it, have no published
recipe on web images; they take 7b's with the heads, the clipping (3) and drop path of the ImageNet
ViT-L (of 384 and 768 channels: 0.1). Groups of 16 images.
In 7b the norm of CLS and registers of local crops is the common one (the original has another, in
training alone). The Gram stage begins at its full weight, and local crops weigh half at once (the
original takes 1,000 steps). Positions are computed in float32; products in bfloat16, where the
original's 7b takes 8 bits. At high resolution the original begins with the teacher of the Gram
stage as student, fresh moments and a ramp of 10,000 steps; here student, moments and step go on, at
the full rate. KoLeo looks at 16 images in both; masks are stratified within 16 here, there in 8.
Local crops of 160 pixels stand for its 168, of which patches of 16 leave out the last 8.

Licence: this code owes nothing to Meta's, and networks trained from scratch by it are yours. What
starts from, or is distilled from, Meta's weights comes under the DINOv3 License
(docs/methods.md).

Expected figures: the ImageNet ViT-L has 82.2 (k-NN) and 83.3 (linear), theirs; of this code none
yet. Nothing has run on real chips. A network that knows nothing starts near a DINO loss of ln K and
an iBOT loss of half of that, and KoLeo near 8; until the warm-up has gone far they hardly move.
"""

from ml_collections import ConfigDict

from webssl_jax.config import ConfigError, parse_arg, suggest

from .common import apply_preset, vit
from .web_dino import vitg14

SIZES = {
    "s": {"width": 384, "depth": 12, "heads": 6, "mlp": "gelu"},
    "b": {"width": 768, "depth": 12, "heads": 12, "mlp": "gelu"},
    "l": {"width": 1024, "depth": 24, "heads": 16, "mlp": "gelu"},
    "splus": {"width": 384, "depth": 12, "heads": 6, "mlp": "swiglu", "mlp_hidden": 1536},
    "lplus": {"width": 1024, "depth": 24, "heads": 16, "mlp": "swiglu", "mlp_hidden": 4096},
    "hplus": {"width": 1280, "depth": 32, "heads": 20, "mlp": "swiglu", "mlp_hidden": 5120},
    "7b": {
        "width": 4096,
        "depth": 40,
        "heads": 32,
        "mlp": "swiglu",
        "mlp_hidden": 8192,
        "qkv_bias": False,
    },
    "tiny": {"width": 128, "depth": 6, "heads": 4, "mlp": "gelu"},
}
_STEPS = 1_000_000  # of stage 1
_STAGES = ("1", "gram", "high_res")


def get_config(arg=None):
    """See the module's docstring."""
    arg = parse_arg(arg, size="l", stage="1", recipe="web", preset="")
    for name, known in (
        ("size", tuple(SIZES)),
        ("stage", _STAGES),
        ("recipe", ("web", "imagenet")),
    ):
        if arg[name] not in known:
            raise ConfigError(f"config argument {name}={arg[name]}: {suggest(arg[name], known)}")
    if arg.recipe == "imagenet" and (arg.size, arg.stage) != ("l", "1"):
        raise ConfigError("config argument recipe=imagenet: is of size=l and stage=1")
    config = _stage1(arg.size)
    config.name = f"dinov3_{arg.size}" + f"_{arg.stage}" * (arg.stage != "1")
    if arg.recipe == "imagenet":
        _imagenet(config)
    if arg.size == "tiny":
        _tiny(config)
    if arg.stage != "1":
        _gram(config, tiny=arg.size == "tiny")
    if arg.stage == "high_res":
        _high_res(config, tiny=arg.size == "tiny")
    apply_preset(config, arg.preset)
    return config


def _stage1(size: str) -> ConfigDict:
    config = vitg14("300m")
    batch = 4096
    config.global_batch = batch
    config.total_images = _STEPS * batch
    big = size == "7b"
    config.model = vit(
        None,
        dtype="bfloat16",
        remat="full",
        patch_size=16,
        position="rope",
        rope_rescale=2.0,
        num_registers=4,
        layer_scale=1e-5,
        norm_eps=1e-5,
        key_bias=False,
        mask_token=True,
        init="dinov3",
        drop_path={"7b": 0.4, "l": 0.3, "lplus": 0.3, "hplus": 0.3}.get(size, 0.1),
        **SIZES[size],
    )
    method, optim = config.method, config.optim
    method.group_images = 16
    method.momentum = 0.994
    method.final_momentum = 0.994
    method.layer_decay = 0.98
    method.freeze_last_layer_images = 5_000 * batch
    method.teacher_temperature_warmup_images = 100_000 * batch
    method.view.update({"global_size": 256, "local_size": 112, "flip": 0.0})
    heads = {"prototypes": 65_536, "bottleneck": 256, "hidden": 2048}, None
    if big:
        heads = (
            {"prototypes": 262_144, "bottleneck": 512, "hidden": 8192},
            {"prototypes": 98_304, "bottleneck": 384, "hidden": 4096},
        )
    for head, fields in zip((method.dino_head, method.ibot_head), (heads[0], heads[1] or heads[0])):
        head.update(fields | {"weight_norm": False})
    optim.lr = 4 * 5e-5
    optim.lr_batch = 1024
    optim.lr_schedule = "constant"
    optim.final_lr = 0.0
    optim.warmup_images = 100_000 * batch
    optim.warmup_ends_at_peak = False
    optim.weight_decay = 0.04
    optim.final_weight_decay = None
    optim.b2 = 0.99
    optim.clip_norm = 30.0 if big else 3.0
    return config


def _imagenet(config: ConfigDict) -> None:
    """vitl_im1k_lin834.yaml: 100 epochs of 1,250 steps."""
    batch = 2048
    config.name = "dinov3_l_imagenet"
    config.global_batch = batch
    config.total_images = 125_000 * batch
    config.model.update({"rope_rescale": None, "num_registers": 0, "norm_eps": 1e-6})
    config.model.key_bias = True
    method, optim = config.method, config.optim
    method.group_images = 64
    method.momentum = 0.992
    method.final_momentum = 1.0
    method.layer_decay = 0.9
    method.freeze_last_layer_images = 1_250 * batch
    method.teacher_temperature_warmup_images = 37_500 * batch
    method.view.update({"global_size": 224, "local_size": 96, "flip": 0.5})
    optim.lr = 4 * 1e-3
    optim.lr_schedule = "cosine"
    optim.final_lr = 1e-6
    optim.warmup_images = 12_500 * batch
    optim.final_weight_decay = 0.4
    optim.b2 = 0.999


def _gram(config: ConfigDict, tiny: bool) -> None:
    """The second stage: 200,000 steps more, a slower teacher, and a third network."""
    done, batch = config.total_images, config.global_batch
    config.total_images = done + done // 5
    config.method.final_momentum = config.method.momentum = 0.999
    config.method.local_weight = 0.5
    config.method.gram = {
        "weight": 2.0,
        "size": 96 if tiny else 512,
        "teacher": "",
        "refresh_images": done + (done // 100),
        "refresh_every_images": 10_000 * batch,
        "refreshes": 0 if tiny else 3,
    }
    if not tiny:
        config.optim.lr = 4 * 3e-5


def _high_res(config: ConfigDict, tiny: bool) -> None:
    """The third stage: larger crops, of sizes that change from batch to batch."""
    done, batch = config.total_images // config.global_batch, 64 if tiny else 2048
    config.global_batch = batch
    config.total_images = (done + (100 if tiny else 30_000)) * batch
    method, optim = config.method, config.optim
    sizes = {
        "global_size": (512, 768, 768, 768, 768),
        "local_size": (112, 112, 160, 224, 336),
        "gram_size": (768, 1152, 1152, 1152, 1152),
        "shares": (0.3, 0.3, 0.3, 0.05, 0.05),
    }
    if tiny:
        sizes = {
            "global_size": (64, 96),
            "local_size": (24, 32),
            "gram_size": (96, 144),
            "shares": (0.5, 0.5),
        }
    method.crop_sizes = sizes
    method.view.update(
        {"global_size": sizes["global_size"][-1], "local_size": sizes["local_size"][-1]}
    )
    first = done * batch
    method.gram.update({"weight": 1.5, "size": sizes["gram_size"][-1], "refreshes": 1})
    method.gram.update({"refresh_images": first, "refresh_every_images": 0})
    # what came before is over: durations count in images of this stage's batch
    method.teacher_temperature_warmup_images = method.freeze_last_layer_images = 0
    optim.warmup_images = 0
    if not tiny:
        optim.lr = 4 * 1.25e-5


def _tiny(config: ConfigDict) -> None:
    """No recipe of theirs: 48 pixels, patches of 8, some minutes on two CPU cores."""
    batch = 64
    config.global_batch = batch
    config.total_images = 64_000
    config.model.update({"patch_size": 8, "drop_path": 0.0, "dtype": "float32", "remat": "none"})
    # as in web_dino.py:size=tiny, which says why
    config.model.update({"init": "mae", "layer_scale": 1.0})
    method, optim = config.method, config.optim
    method.momentum = method.final_momentum = 0.99
    method.layer_decay = 1.0
    method.view.update({"global_size": 48, "local_size": 24, "local_count": 4})
    for head in (method.dino_head, method.ibot_head):
        head.update({"prototypes": 1024, "bottleneck": 64, "hidden": 256})
    method.teacher_temperature_warmup_images = 6_400
    method.freeze_last_layer_images = 640
    optim.lr = 1e-3
    optim.lr_batch = batch
    optim.warmup_images = 6_400
    optim.b2 = 0.999
    config.data.train = "corpus:train"
