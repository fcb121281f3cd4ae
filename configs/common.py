"""What every experiment shares: the full tree of keys with their defaults. An experiment changes
some of them.

Durations carry their unit in their name (``_steps``, ``_images``, ``_percent`` of the run); see
webssl_jax/config.py.
"""

import dataclasses
import re

from ml_collections import ConfigDict

from webssl_jax.config import ConfigError, suggest
from webssl_jax.models.sizes import ViTConfig

# What suits a run on such chips, by regular expressions over the names of configs. fsdp: over how
# many devices the state is cut, the rest holding copies of it; the first that matches. Fewer send
# fewer bytes and take more memory. named: whose products are kept for the backward pass (remat
# "named"). most: whose products are kept but those of the MLP; where memory does not allow that
# either, the blocks run again ("full"). Sized for 256 chips, v5p for 128: on fewer a chip holds
# more images, so ask plan. A slice, or several, has a name of its own where its chips leave CLIP
# more memory than that. docs/plan_table.md has what each gives; the compiler's options are in
# webssl_jax/sharding/compiler_options.py.
_SMALL_CLIP = r"clip_(b32|b16|l14|300m)(_[a-z]+)?"
_DINOV3 = r"dinov3_(?!.*high_res).*"  # whose crops have many more tokens
_31_GIB = {
    "fsdp": {"(web_dino_[57]|dinov3_7)b.*": 32, ".*": 16},
    "named": rf"web_mae_.*|web_dino_[^_]+(_[a-z]+)?|(?!dinov3_7b){_DINOV3}|{_SMALL_CLIP}",
    "most": "dinov3_7b",
}
PRESETS = {
    "v4": _31_GIB,
    "v5e": {
        "fsdp": {"clip_[57]b.*|vqa_.*": 64, ".*": 16},
        "named": r"web_mae_.*|web_dino_(300m|1b|2b)(_[a-z]+)?",
    },
    "v5p": {"fsdp": {".*": 16}, "named": rf"web_mae_.*|web_dino_.*|{_DINOV3}|{_SMALL_CLIP}"},
    "v5p-512": {"fsdp": {"clip_7b.*": 32, ".*": 16}, "named": r"(?!dinov3_.*high_res).*"},
    "2xv5p-256": {"fsdp": {".*": 16}, "named": r"(?!clip_7b|dinov3_.*high_res).*"},
    "v6e": _31_GIB,
}


def apply_preset(config: ConfigDict, name: str) -> None:
    """Sets the keys of :data:`PRESETS` in place; "" changes nothing.

    Raises:
      ConfigError: for a name that is not in it.
    """
    if not name:
        return
    if name not in PRESETS:
        raise ConfigError(f"config argument preset={name}: {suggest(name, PRESETS)}")
    preset = PRESETS[name]
    ways = next(n for who, n in preset["fsdp"].items() if re.fullmatch(who, config.name))
    config.sharding.update({"replica": -1, "fsdp": ways})
    kept = (way for way in ("named", "most") if re.fullmatch(preset.get(way, ""), config.name))
    config.model.remat = next(kept, "full")


def base() -> ConfigDict:
    """A config with every key; ``model``, ``method`` and ``data.train`` are for the experiment to
    fill."""
    return ConfigDict(
        {
            "name": "",
            "seed": 0,
            "total_images": 2_000_000_000,
            "global_batch": 4096,
            # microbatches a step; refused for methods whose loss couples the batch
            "accumulation_steps": 1,
            "model": {},
            "method": {},
            "data": {
                # ArrayRecord shards: a folder, a glob, or corpus:train; several with commas between
                "train": "",
                "workers": 0,  # decoding processes a host; 0 decodes in threads
                "threads": 16,  # reading and decoding threads a process
                "read_ahead": 2,  # batches kept ready; memory is read_ahead x batch
                # for so long storage that fails is tried again, then the run saves and ends with
                # 75; 0 = not at all, and loader processes that die are not started again either
                "retry_minutes": 5.0,
                # the share of shards that may be missing, damaged or out of reach, and are passed
                # over; 0 = the run refuses the first
                "max_lost_shards": 0.0,
                # the share of images that may be replaced by others because they are damaged,
                # judged from 10,000 on; 0 = the first ends the run
                "max_damaged_records": 1.0,
                "allow_change": False,  # go on though the records are not those of the run's start
            },
            # instead of data.train, several sources and their shares: {NAME: {"train": shards,
            # "share": 1.0, "selection": FILE, "cap": 0}} (webssl_jax/data/mixture.py)
            "mixture": {},
            "optim": {
                # at the peak, for batches of lr_batch images; the run's own rate follows from
                # global_batch by lr_scaling: linear, sqrt or none (config.learning_rate)
                "lr": 1.5e-4,
                "lr_batch": 256,
                "lr_scaling": "linear",
                "final_lr": 0.0,  # at the end, as it is: not scaled
                # cosine: falls to final_lr at the end. constant: stays at the peak, so that a run
                # has no end it must know; over the last cooldown it falls linearly to final_lr
                "lr_schedule": "cosine",
                "warmup_images": 0,
                "cooldown_images": 0,
                "warmup_ends_at_peak": False,  # DINOv2's; else the first step after it (MAE's)
                "weight_decay": 0.05,
                "final_weight_decay": None,  # None: as weight_decay
                "b1": 0.9,
                "b2": 0.95,
                "eps": 1e-8,
                "moment_dtype": "float32",  # of the first moment
                "clip": "none",  # none, global or per_module
                "clip_norm": 1.0,
                # (("regex", factor), ...) over parameter paths, before the method's own
                "lr_multipliers": (),
                "frozen": (),  # ("regex", ...): parameters that are not trained
                # end the run when this many logged steps in a row were not finite
                "abort_after_skipped": 50,
            },
            # which steps may not change the state; webssl_jax/optim/guard.py
            "guard": {
                # refuse a gradient norm of so many times its running mean; 0 = off
                "spike_factor": 0.0,
                "spike_window_steps": 128,  # of the mean; no step before them is a spike
                "spike_max_skips": 3,  # spikes in a row, then the level is taken for a new one
                # refused steps that are saved whole in bad_steps/, to be run again by --replay
                "save_bad_steps": 5,
            },
            "sharding": {
                "replica": 1,  # plain data parallel, across slices
                "fsdp": -1,  # data parallel with sharded state; -1 = all devices that are left
                "tensor": 1,  # matrix products split over devices
                # of the parameter bytes, else the run does not start
                "max_unsharded_fraction": 0.02,
            },
            "checkpoint": {
                # where they lie; empty = in the workdir. gs://BUCKET/FOLDER: all hosts write at
                # once, without a mount; takes the extra "gcp"
                "folder": "",
                "every_steps": 5000,
                "keep_last": 2,
                "keep_every_steps": 0,  # also keep every multiple of this for good; 0 = off
                # the first replica reads a checkpoint, the others get it over the network
                "restore_once": False,
                # a folder on each machine's own disk, for small steps between those above; they
                # serve a run that starts again on machines that are still there; empty = none
                "local_folder": "",
                "local_every_steps": 100,
            },
            # trackers: none, or some of tensorboard,wandb,mlflow; metrics.jsonl is always written
            "log": {"every_steps": 50, "trackers": "tensorboard"},
            # what a process owes the others; webssl_jax/telemetry/host.py
            "host": {
                "gc_every_steps": 200,  # garbage is collected by all at the same step; 0 = at will
                # a step that takes longer prints the stacks and ends the process; 0 = no limit
                "stuck_minutes": 60.0,
                "stuck_pause_minutes": 240.0,  # so does the start, a save or an evaluation
                # folder for compiled programs; empty = what JAX_COMPILATION_CACHE_DIR says, or the
                # user's ~/.cache/webssl_jax; none = keep none
                "compilation_cache": "",
            },
            # a profile of the steps after start_step (0 = none); `touch RUN/PROFILE` takes one, too
            "profile": {"start_step": 0, "steps": 3},
            # {name: {"kind": ..., its options, "every_steps": 0}}: what is measured of the frozen
            # features, at the first and the last step and every so often between
            # (webssl_jax/evaluators/base.py); configs/evals has rows ready
            "evals": {},
            "eval_batch": 256,  # images a call when features are made
            "pictures": {
                "source": "",  # shards to draw from; empty = data.train
                "every_steps": 0,  # besides the first and the last step
                "images": 8,  # shown on a sheet, 1 to 64
                # all, none, or some of: reconstruction,pca,attention,neighbours,norms
                "kinds": "all",
                "candidates": 256,  # images that neighbours and norms are taken from
            },
            "resume_from": "",  # another run's workdir: continue its whole state here
            # the same under another config of the method: a second stage, such as DINOv3's Gram
            # stage; step, moments and teacher go on, and the schedules count from the first stage
            "continue_from": "",
            "init_from": "",  # take the weights of another run, or of files (FILE or FILE,FILE)
        }
    )


def vit(size: str, remat: str, **fields) -> dict:
    """The ``model`` group: a named size, and every field of ``ViTConfig`` to override it with.

    None stands for the size's own value. ``remat`` is spelled out, because its "none" is a value.
    """
    unset = {field.name: None for field in dataclasses.fields(ViTConfig)}
    return {"size": size} | unset | {"remat": remat} | fields
