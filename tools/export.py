r"""Exports a trained run to a folder that PyTorch code loads, with its figures in a model card.

    python tools/export.py --workdir W --format hf-vit --output DIR \
        [--step N] [--dtype bfloat16] [--verify]

Formats: hf-vit (transformers' ViTModel: the encoder) and hf-vit-mae (ViTMAEForPreTraining: encoder
and decoder). --verify loads the folder with transformers and compares features with this code, at
the run's own image size and at another, not square one; for hf-vit-mae also the loss under the same
mask. It needs the export extra: pip install '.[export]'.

Exit codes: 0 done · 1 --verify found a difference · 2 bad input, a full disk, or PyTorch missing.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np

from webssl_jax import checkpoints, cli
from webssl_jax import params as params_lib
from webssl_jax.config import UserError
from webssl_jax.methods import pixels
from webssl_jax.methods.base import Variables
from webssl_jax.weights import hf_folder, safetensors_io
from webssl_jax.weights.families import FAMILIES

# Largest relative error |ours - theirs| / |theirs| (Euclidean norms) that still counts as the same
# function computed in another order in float32. Measured: 3e-7 at 2 blocks of width 32, 1.5e-6 at
# 24 blocks of width 1024. An activation of another kind (GELU's tanh form) or a position table in
# bfloat16 is above it.
TOLERANCE = 2e-5


class Comparison(NamedTuple):
    """What was compared, largest absolute and relative error."""

    what: str
    absolute: float
    relative: float


def main(argv: list[str] | None = None) -> int:
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", required=True, help="the run")
    parser.add_argument(
        "--step", type=int, default=None, help="which checkpoint; the newest when left out"
    )
    parser.add_argument("--format", required=True, choices=sorted(FAMILIES))
    parser.add_argument(
        "--output", required=True, help="folder to write; an earlier export there is replaced"
    )
    parser.add_argument("--dtype", default="float32", choices=sorted(safetensors_io.DTYPES))
    parser.add_argument(
        "--verify", action="store_true", help="load it with transformers and compare features"
    )
    args = parser.parse_args(argv)
    transformers = import_transformers() if args.verify else None  # before the work, not after it

    run = checkpoints.load_run(args.workdir, args.step)
    print(
        f"{args.workdir}: step {run.step:,}, {params_lib.count(run.variables.params):,} parameters"
    )
    folder = hf_folder.export_run(run, args.format, args.output, args.dtype)
    for file in sorted(folder.iterdir()):
        print(f"  {file}  {file.stat().st_size:,} bytes")
    if transformers is None:
        return 0
    comparisons = verify(run, args.format, folder, args.dtype, transformers)
    for c in comparisons:
        verdict = "same" if c.relative <= TOLERANCE else "DIFFERENT"
        print(
            f"  verify: {c.what}: largest error {c.absolute:.1e}, "
            f"relative {c.relative:.1e}: {verdict}"
        )
    if all(c.relative <= TOLERANCE for c in comparisons):
        print(
            f"verified with transformers {transformers.__version__}: no key missing or "
            f"unexpected, all relative errors within {TOLERANCE:g}"
        )
        return 0
    print(
        f"error: {folder} does not compute what this code computes "
        f"(relative error above {TOLERANCE:g})"
    )
    return 1


def import_transformers() -> Any:
    """The library, with PyTorch behind it.

    Raises:
      UserError: if either is missing or broken; one line that names the reason.
    """
    try:
        import torch  # noqa: F401
        import transformers

        _ = transformers.ViTModel, transformers.ViTMAEForPreTraining
        transformers.utils.logging.disable_progress_bar()
    except (ImportError, RuntimeError) as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise UserError(
            "--verify needs torch and transformers: pip install '.[export]' "
            f"({type(cause).__name__}: {str(cause).splitlines()[0]})"
        ) from error
    return transformers


def verify(
    run: Any, family: str, folder: pathlib.Path, dtype: str, transformers: Any
) -> list[Comparison]:
    """Loads ``folder`` with ``transformers`` and compares it with our own code, both in float32.

    The weights are first read back with our importer, which must give the run's own, bit by bit (in
    bfloat16: rounded once). These are then what our side computes with, so the comparison is about
    layouts, not about rounding.

    Raises:
      WeightsError: if our importer refuses the folder.
      UserError: if the weights read back differ, or transformers misses keys or meets unknown ones.
    """
    imported = hf_folder.import_folder(folder, family, run.method)
    _check_same_weights(run.variables.params, imported, dtype)
    method = _in_float32(run.method)
    model = _load(transformers, FAMILIES[family].model_class, folder)
    side, patch = method.encoder.image_size, method.encoder.patch_size
    comparisons = []
    for height, width in ((side, side), (side + patch, side + 3 * patch)):
        images = np.random.default_rng(0).integers(0, 256, (2, height, width, 3)).astype(np.uint8)
        with jax.default_matmul_precision("highest"):
            seen = jax.jit(method.features)(Variables(imported, {}, {}), images)
        ours = np.concatenate(
            [seen.cls[:, None], seen.patches.reshape(2, -1, seen.cls.shape[-1])], axis=1
        )
        name = f"features at {height}x{width}"
        comparisons.append(_compare(name, ours, _their_tokens(model, _pixels(method, images))))
    if "decoder" in FAMILIES[family].needs:
        comparisons += _compare_decoder(method, imported, model)
    return comparisons


def _check_same_weights(params: Any, imported: Any, dtype: str) -> None:
    original = params_lib.flatten(params)
    for path, array in params_lib.flatten(imported).items():
        wanted = np.asarray(original[path]).astype(safetensors_io.DTYPES[dtype]).astype(np.float32)
        if not np.array_equal(array, wanted):
            raise UserError(f"--verify: {path} read back from the export is not what the run holds")


def _in_float32(method: Any) -> Any:
    """The method computing in float32, and without chance: its loss is that of training."""

    def exact(config):
        return dataclasses.replace(config, dtype="float32", remat="none", drop_path=0.0)

    parts = {
        name: exact(getattr(method, name))
        for name in ("encoder", "decoder")
        if hasattr(method, name)
    }
    return dataclasses.replace(method, **parts)


def _load(transformers: Any, model_class: str, folder: pathlib.Path) -> Any:
    options = {"add_pooling_layer": False} if model_class == "ViTModel" else {}
    model, info = getattr(transformers, model_class).from_pretrained(
        folder, dtype="float32", output_loading_info=True, **options
    )
    problems = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
    if problems:
        raise UserError(f"--verify: transformers does not load {folder} cleanly: {problems}")
    return model.eval()


def _pixels(method: Any, images: np.ndarray) -> np.ndarray:
    """(B, 3, H, W) float32, normalised: what ``transformers`` calls pixel_values."""
    return np.array(pixels.normalise(images, method.mean, method.std)).transpose(0, 3, 1, 2).copy()


def _their_tokens(model: Any, pixel_values: np.ndarray) -> np.ndarray:
    """CLS and patch features (B, 1 + N, D) of either model class, nothing hidden."""
    import torch

    x = torch.from_numpy(pixel_values)
    with torch.no_grad():
        if not hasattr(model, "decoder"):
            return model(x, interpolate_pos_encoding=True).last_hidden_state.numpy()
        # ViTMAE always masks: hide nothing, and let rising noise keep the patches in their order.
        patch, ratio = model.config.patch_size, model.config.mask_ratio
        patches = (x.shape[2] // patch) * (x.shape[3] // patch)
        noise = torch.linspace(0, 1, patches).expand(len(x), -1)
        model.config.mask_ratio = 0.0
        try:
            return model.vit(
                x, noise=noise, interpolate_pos_encoding=True
            ).last_hidden_state.numpy()
        finally:
            model.config.mask_ratio = ratio


def _compare_decoder(method: Any, params: Any, model: Any) -> list[Comparison]:
    """Loss under the same noise, at the native size only.

    At other sizes the decoder of ``transformers`` resizes its positions as if the patches stood in
    one long row. Nothing was trained like that, so there is nothing to compare.
    """
    import torch

    side, patches = method.encoder.image_size, method.encoder.num_patches
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (2, side, side, 3)).astype(np.uint8)
    noise = rng.random((2, patches), dtype=np.float32)
    with jax.default_matmul_precision("highest"):
        loss = jax.jit(method.loss)(
            params, {}, {}, {"image": images, "noise": noise}, jax.random.key(0), {}
        ).loss
    with torch.no_grad():
        theirs = model(torch.from_numpy(_pixels(method, images)), noise=torch.from_numpy(noise))
    return [
        _compare("reconstruction loss under the same mask", np.asarray(loss), theirs.loss.numpy())
    ]


def _compare(what: str, ours: np.ndarray, theirs: np.ndarray) -> Comparison:
    difference = ours.astype(np.float64) - theirs
    if not np.isfinite(difference).all():
        return Comparison(what, float("inf"), float("inf"))
    relative = np.linalg.norm(difference.ravel()) / np.linalg.norm(
        np.asarray(theirs, np.float64).ravel()
    )
    return Comparison(what, float(np.abs(difference).max()), float(relative))


if __name__ == "__main__":
    cli.run(main)
