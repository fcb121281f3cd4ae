r"""Writes weights for PyTorch code: of a trained run, with its figures in a model card, or of any
weight file this code reads, tensor by tensor.

    python tools/export.py --workdir W --format hf-vit --output DIR \
        [--step N] [--dtype bfloat16] [--verify]
    python tools/export.py --weights FILE_OR_FOLDER --format mae-pth --output FILE.pth

Formats:
  hf-vit                the encoder, for transformers' ViTModel (MAE's blocks)
  hf-dinov2             the encoder, for Dinov2Model (DINOv2's blocks)
  hf-dinov2-registers   the encoder, for Dinov2WithRegistersModel
  timm                  the encoder, of either kind
  timm-clip             CLIP's image tower alone
  timm-siglip           SigLIP's image tower alone, with its pooling
  hf-vit-mae            encoder and decoder, for ViTMAEForPreTraining
  mae-pth               encoder and decoder, a .pth file of the original MAE code
  dinov2-pth            the encoder, a .pth file as DINOv2 and Web-SSL publish them
  dinov2-teacher        encoder and heads, a .pth file as DINOv2's training writes it
  dinov2-heads          the heads alone
  hf-clip               both towers, for CLIPModel; with the tokenizer's files, so that the folder
                        opens in pipeline("zero-shot-image-classification")
  hf-clip-vision        CLIP's image tower alone, for CLIPVisionModel
  hf-siglip             SigLIP's towers, for SiglipModel, as hf-clip
  hf-siglip-vision      its image tower alone, for SiglipVisionModel
  open-clip             both towers, a folder for open_clip ("local-dir:DIR")
  open-clip-pth         both towers, a .pt file for open_clip and MetaCLIP
  hf-llava              encoder, connector and language model of a run of configs/vqa.py, for
                        LlavaForConditionalGeneration; docs/vqa.md says which it can hold
Of a run that has a teacher (DINO) the teacher is written: the weights that its features, figures
and pictures come from. --student writes the network that was trained.

The model card names no folder of this machine. --license puts a licence into it; --push uploads the
folder to the hub of Hugging Face, as a private model unless it is there already (extra: hub).

--verify reads the result back and compares it bit by bit, then loads it with the other library. For
transformers and timm it compares features at the model's own image size (for ViTModel, ViTMAE and
Dinov2Model also at another, not square one, and for hf-vit-mae the loss under the same mask); of
two towers their embeddings and logits; for .pth files the tensors that torch.load gives. It needs
the export extra: pip install '.[export]', for timm also timm, for open-clip open_clip_torch.

Exit codes: 0 done · 1 --verify found a difference · 2 bad input, a full disk, or PyTorch missing.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import pathlib
from typing import Any, NamedTuple

from webssl_jax import cli
from webssl_jax.config import UserError
from webssl_jax.weights import given


def _parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--workdir", help="the run")
    source.add_argument("--weights", help="instead of a run: a weight file or folder")
    parser.add_argument(
        "--step", type=int, default=None, help="which checkpoint; the newest when left out"
    )
    given.add_flags(parser)
    parser.add_argument(
        "--student",
        action="store_true",
        help="the network that was trained, of a run whose teacher is evaluated",
    )
    parser.add_argument("--format", required=True, choices=sorted([*given.FORMATS, "hf-llava"]))
    parser.add_argument(
        "--output", required=True, help="folder, or .pth file; an earlier export is replaced"
    )
    parser.add_argument(
        "--chunks",
        type=int,
        help="name the blocks as a network built with this block_chunks has them (Web-SSL's are "
        "built with 4); for dinov2-pth and dinov2-teacher",
    )
    parser.add_argument("--dtype", default="float32", choices=("bfloat16", "float32"))
    parser.add_argument("--verify", action="store_true", help="compare with the other library")
    parser.add_argument("--license", help="for the model card, as the hub names it: apache-2.0")
    parser.add_argument(
        "--push", metavar="ORGANISATION/NAME", help="upload the folder to the hub, as private"
    )
    return parser


cli.help_early(_parser, __name__)

import jax
import jax.numpy as jnp
import numpy as np

from webssl_jax import params as params_lib
from webssl_jax import publish, runs
from webssl_jax.language import llava
from webssl_jax.methods import losses
from webssl_jax.model import Model
from webssl_jax.models import pixels
from webssl_jax.models.features import Want
from webssl_jax.models.position import INTERPOLATIONS
from webssl_jax.weights import load, preprocessing, safetensors_io, shapes, tables
from webssl_jax.weights.card import Named
from webssl_jax.weights.families import FAMILIES, Family, table_of
from webssl_jax.weights.networks import Networks
from webssl_jax.weights.tokenizer_files import has_tokenizer

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
    parser = _parser()
    args = parser.parse_args(argv)
    options = given.options(args)
    if args.workdir and options:
        parser.error(f"--{next(iter(options)).replace('_', '-')} belongs to --weights")
    for flag in ("step", "student"):
        if args.weights and getattr(args, flag) not in (None, False):
            parser.error(f"--{flag} belongs to --workdir")
    if args.format == llava.FORMAT:
        beyond = ("weights", "student", "chunks", "verify", "license", "push")
        if given_too := [flag for flag in beyond if getattr(args, flag)]:
            parser.error(f"--{given_too[0]}: not of {llava.FORMAT}, which is made of a --workdir")
        return _export_llava(args)
    if (args.license or args.push) and not FAMILIES[args.format].config:
        parser.error(f"--license, --push: {args.format} is one file, without a model card")
    if args.push and not args.license:
        parser.error("--push needs --license: without one nobody may use what you publish")
    named = Named.of(args.output, args.license)
    named = named if not args.push else Named(args.push, args.license)
    library = import_library(args.format) if args.verify else None  # before the work, not after it

    if args.workdir:
        run = runs.load_run(args.workdir, args.step)
        tree = run.method.evaluated
        if args.student and tree == "params":
            raise UserError(f"--student: {args.workdir} has no teacher, and one network alone")
        tree = "params" if args.student else tree
        networks, params = Networks.of(run.method), getattr(run.variables, tree)
        what = f"{args.workdir}: step {run.step:,}"
        if run.method.evaluated != "params":
            what += f", its {'student' if args.student else tree}"
        output = publish.export_run(
            run, args.format, args.output, args.dtype, chunks=args.chunks, tree=tree, named=named
        )
    else:
        loaded = load.open_(args.weights, **options)
        networks, params = loaded.networks, loaded.params
        what = f"{args.weights}: {loaded.family}"
        if networks.encoder:
            what += f", {shapes.size_name(networks.encoder)}"
        if loaded.assumed:
            print(f"assumed: {', '.join(loaded.assumed)}")
        output = publish.export_loaded(
            loaded, args.format, args.output, args.dtype, chunks=args.chunks, named=named
        )
    print(f"{what}, {params_lib.count(params):,} parameters")
    for file in sorted(output.iterdir()) if output.is_dir() else [output]:
        print(f"  {file}  {file.stat().st_size:,} bytes")
    for note in _unsaid(networks, FAMILIES[args.format]):
        print(f"note: {note}")
    code = 0
    if library is not None:
        code = _verify(networks, params, args.format, output, args.dtype, library)
    if args.push and code == 0:
        print(f"uploaded to {publish.push(output, args.push)}")
    return code


def _export_llava(args: argparse.Namespace) -> int:
    run = runs.load_run(args.workdir, args.step)
    networks, params = Networks.of(run.method), run.variables.params
    output = llava.write_folder(args.output, networks, params, args.dtype)
    print(f"{args.workdir}: step {run.step:,}, {params_lib.count(params):,} parameters")
    print(f"  {output}: for transformers' LlavaForConditionalGeneration; its README.md says how")
    return 0


def _verify(
    networks: Networks, params: Any, family: str, output: pathlib.Path, dtype: str, library: Any
) -> int:
    """Prints what :func:`verify` finds: 1 if anything differs."""
    comparisons = verify(networks, params, family, output, dtype, library)
    for c in comparisons:
        verdict = "same" if c.relative <= TOLERANCE else "DIFFERENT"
        print(
            f"  verify: {c.what}: largest error {c.absolute:.1e}, "
            f"relative {c.relative:.1e}: {verdict}"
        )
    if all(c.relative <= TOLERANCE for c in comparisons):
        print(
            f"verified with {library.__name__} {library.__version__}: no key missing or "
            f"unexpected, all relative errors within {TOLERANCE:g}"
        )
        return 0
    print(
        f"error: {output} does not compute what this code computes "
        f"(relative error above {TOLERANCE:g})"
    )
    return 1


def _unsaid(networks: Networks, family: Family) -> list[str]:
    """What a ``.pth`` cannot say of its encoder, where it is not what its reader will assume. (A
    folder has config files and a model card.)"""
    if "text" in family.needs and not has_tokenizer(networks.text.vocabulary):
        return [
            f"no tokenizer is written: {networks.text.vocabulary:,} ids are not those of "
            "webssl_jax.data.tokens"
        ]
    if family.config or not networks.encoder:
        return []
    notes, ours = [], networks.encoder.position_resize
    theirs = family.resize_of(networks.encoder.num_registers)
    if networks.encoder.position == "learned" and ours != theirs:
        notes.append(
            "at other sizes its reader resizes positions "
            f"{INTERPOLATIONS[theirs].words}, the training {INTERPOLATIONS[ours].words}"
        )
    assumed, own = preprocessing.default(1, family.towers), networks.preprocess
    if (own.mean, own.std) != (assumed.mean, assumed.std):
        notes.append(f"images were normalised by mean {own.mean} and std {own.std}")
    return notes


def import_library(family: str) -> Any:
    """The library that --verify compares with, with PyTorch behind it.

    Raises:
      UserError: if it is missing or broken; one line that names the reason.
    """
    name = FAMILIES[family].library if FAMILIES[family].config else "torch"
    try:
        import torch  # noqa: F401

        library = importlib.import_module(name)
        if name == "transformers":
            getattr(library, FAMILIES[family].opens)
            library.utils.logging.disable_progress_bar()
    except (ImportError, RuntimeError) as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        install = {"timm": "timm and torchvision", "open_clip": "open_clip_torch"}
        install = install.get(name, "'.[export]'")
        raise UserError(
            f"--verify needs torch and {name}: pip install {install} "
            f"({type(cause).__name__}: {str(cause).splitlines()[0]})"
        ) from error
    return library


def verify(
    networks: Networks, params: Any, family: str, output: pathlib.Path, dtype: str, library: Any
) -> list[Comparison]:
    """Loads ``output`` with ``library`` and compares it with our own code, both in float32.

    The weights are first read back with our importer, which must give ``params``, bit by bit (in
    bfloat16: rounded once). These are then what our side computes with, so the comparison is about
    layouts, not about rounding. Positions are resized as ``library`` does.

    Raises:
      WeightsError: if our importer refuses the output.
      UserError: if the weights read back differ, or the library misses keys or meets unknown ones.
    """
    stated = {}
    if networks.encoder:
        networks = _in_float32(networks, FAMILIES[family].resize_of(networks.encoder.num_registers))
        if not FAMILIES[family].config:
            stated["heads"] = networks.encoder.heads
    imported = load.load(output, family, **stated).params
    _check_same_weights(networks, params, imported, family, dtype)
    if not FAMILIES[family].config:
        return _compare_tensors(networks, imported, family, output, library)
    theirs = _load(library, family, output)
    ours = Model(networks, jax.tree.map(jnp.asarray, imported))
    if "text" in FAMILIES[family].needs:
        return _compare_towers(ours, theirs)
    (high, wide), patch = networks.encoder.image_shape, networks.encoder.patch_size
    comparisons = []
    other = [(high + patch, wide + 3 * patch)] if high == wide else []
    for height, width in ((high, wide), *other):
        images = np.random.default_rng(0).integers(0, 256, (2, height, width, 3)).astype(np.uint8)
        with jax.default_matmul_precision("highest"):
            seen = ours.features(images, Want(registers=True))
        patches = seen.patches.reshape(2, -1, seen.cls.shape[-1])
        tokens = np.concatenate([seen.cls[:, None], seen.registers, patches], axis=1)
        name = f"features at {height}x{width}"
        comparisons.append(_compare(name, tokens, _their_tokens(theirs, _pixels(ours, images))))
    if "decoder" in FAMILIES[family].needs:
        comparisons += _compare_decoder(ours, theirs)
    return comparisons


def _compare_tensors(
    networks: Networks, params: Any, family: str, file: pathlib.Path, torch: Any
) -> list[Comparison]:
    """The original's code is not at hand: what it would be given, against what should be there."""
    theirs = torch.load(file, map_location="cpu", weights_only=True)
    table, key = table_of(family, networks), FAMILIES[family].key
    names, _ = tables.canonical_names(table, theirs[key] if key else theirs)
    theirs = {ours: (theirs[key] if key else theirs)[name] for ours, name in names.items()}
    ours = dict(tables.export(params, table))
    if set(ours) != set(theirs):
        raise UserError(f"--verify: torch.load finds other tensors in {file} than were written")
    return [_compare(key, ours[key], theirs[key].float().numpy()) for key in ours]


def _check_same_weights(
    networks: Networks, params: Any, imported: Any, family: str, dtype: str
) -> None:
    """What comes back makes the same file again: compared there, as two parameters that are only
    ever added may have become one tensor."""
    table = table_of(family, networks)
    written, again = (tables.export(tree, table) for tree in (params, imported))
    for tensor, (key, wanted), (_, array) in zip(tables.layout(table, params), written, again):
        if not isinstance(tensor.row, tables.Constant):  # which is not rounded
            wanted = wanted.astype(safetensors_io.DTYPES[dtype]).astype(np.float32)
        if not np.array_equal(array, wanted):
            raise UserError(f"--verify: {key} read back from the export is not what the run holds")


def _in_float32(networks: Networks, resize: str) -> Networks:
    """The networks computing in float32, and without chance: their loss is that of training."""

    def exact(config, **more):
        plain = dict(dtype="float32", remat="none", drop_path=0.0)
        return config and dataclasses.replace(config, **plain, **more)

    return dataclasses.replace(
        networks,
        encoder=exact(networks.encoder, position_resize=resize),
        decoder=exact(networks.decoder, position_resize=resize),
        text=exact(networks.text),
    )


def _load(library: Any, family: str, folder: pathlib.Path) -> Any:
    if library.__name__ == "timm":
        options = dict(pretrained=True, dynamic_img_size=True)  # for other sizes too
        return library.create_model(f"local-dir:{folder}", **options).float().eval()
    if family == "open-clip":
        return library.create_model_from_pretrained(f"local-dir:{folder}")[0].float().eval()
    model_class = FAMILIES[family].opens
    options = {"add_pooling_layer": False} if model_class == "ViTModel" else {}
    model, info = getattr(library, model_class).from_pretrained(
        folder, dtype="float32", output_loading_info=True, **options
    )
    problems = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
    if problems:
        raise UserError(f"--verify: transformers does not load {folder} cleanly: {problems}")
    return model.eval()


def _pixels(model: Model, images: np.ndarray) -> np.ndarray:
    """(B, 3, H, W) float32, normalised: what ``transformers`` calls pixel_values."""
    p = model.preprocess
    return np.array(pixels.normalise(images, p.mean, p.std)).transpose(0, 3, 1, 2).copy()


def _their_tokens(model: Any, pixel_values: np.ndarray) -> np.ndarray:
    """CLS and patch features (B, 1 + N, D) of any model class, nothing hidden."""
    import torch

    x = torch.from_numpy(pixel_values)
    with torch.no_grad():
        if hasattr(model, "forward_features"):  # timm
            tokens = model.forward_features(x)
            if getattr(model, "attn_pool", None) is not None:  # SigLIP's
                pooled = model.forward_head(tokens, pre_logits=True)
                tokens = torch.cat([pooled[:, None], tokens], 1)
            return tokens.numpy()
        if hasattr(model, "use_head"):  # SigLIP's image tower
            seen = model(x, interpolate_pos_encoding=True)
            return torch.cat([seen.pooler_output[:, None], seen.last_hidden_state], 1).numpy()
        if hasattr(model, "post_layernorm"):  # CLIP's, which normalises CLS alone
            seen = model(x, interpolate_pos_encoding=True).last_hidden_state
            return model.post_layernorm(seen).numpy()
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


def _compare_decoder(ours: Model, theirs: Any) -> list[Comparison]:
    """Loss under the same noise, at the native size only.

    At other sizes the decoder of ``transformers`` resizes its positions as if the patches stood in
    one long row. Nothing was trained like that, so there is nothing to compare.
    """
    import torch

    encoder = ours.networks.encoder
    (side, _), patches = encoder.image_shape, encoder.num_patches
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (2, side, side, 3)).astype(np.uint8)
    noise = rng.random((2, patches), dtype=np.float32)
    with jax.default_matmul_precision("highest"):
        made = ours.reconstruct(images, noise)
        loss = losses.masked_pixel_loss(*made, ours.networks.norm_pix_loss)
    with torch.no_grad():
        found = theirs(torch.from_numpy(_pixels(ours, images)), noise=torch.from_numpy(noise))
    return [
        _compare("reconstruction loss under the same mask", np.asarray(loss), found.loss.numpy())
    ]


def _compare_towers(ours: Model, theirs: Any) -> list[Comparison]:
    """Embeddings of images and texts, and their logits."""
    import torch

    shape, text = ours.networks.encoder.image_shape, ours.networks.text
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, *shape, 3)).astype(np.uint8)
    tokens = rng.integers(0, text.vocabulary - 1, (3, text.context)).astype(np.int32)
    tokens[:, -1] = text.vocabulary - 1  # the end, once
    with jax.default_matmul_precision("highest"):
        seen, read = ours.text.embed_images(images), ours.text.embed(tokens)
    scale, bias = ours.text.scale_and_bias
    made = (seen, read, np.asarray(seen @ read.T) * scale + bias)
    x, ids = torch.from_numpy(_pixels(ours, images)), torch.from_numpy(tokens).long()
    with torch.no_grad():
        if hasattr(theirs, "encode_image"):  # open_clip
            found = [theirs.encode_image(x, normalize=True)]
            found += [theirs.encode_text(ids, normalize=True), theirs.get_logits(x, ids)[0]]
        else:
            out = theirs(input_ids=ids, pixel_values=x)
            found = [out.image_embeds, out.text_embeds, out.logits_per_image]
    names = ("image embeddings", "text embeddings", "logits")
    return [_compare(name, np.asarray(a), b.numpy()) for name, a, b in zip(names, made, found)]


def _compare(what: str, ours: np.ndarray, theirs: np.ndarray) -> Comparison:
    difference = ours.astype(np.float64) - theirs
    if not np.isfinite(difference).all():
        return Comparison(what, float("inf"), float("inf"))
    if not difference.any():  # and both may be all zero
        return Comparison(what, 0.0, 0.0)
    relative = np.linalg.norm(difference.ravel()) / np.linalg.norm(
        np.asarray(theirs, np.float64).ravel()
    )
    return Comparison(what, float(np.abs(difference).max()), float(relative))


if __name__ == "__main__":
    cli.run(main)
