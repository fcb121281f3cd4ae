"""Opens weights of any family, wherever they lie: a ``.pth`` or ``.safetensors`` file, an index of
several, or a folder of ``transformers`` or timm.

    loaded = load("webssl-mae1b.pth")           # numpy arrays, the whole of it
    opened = open_("facebook-vit-mae-base/")    # the same, each parameter still in the file

The family is found by the names in the file, the network by the shapes of its tensors, and what
shapes cannot say (heads, epsilon, colours) by the ``config.json`` beside them, by what our own
exports keep in a ``.pth``, or by the published sizes. What they say twice must agree.

Positions: a table that equals MAE's sin-cos one is not kept, as the model computes it
(``position = "sincos"``); any other becomes a parameter (``position = "learned"``).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import pathlib
import types
from collections.abc import Mapping
from typing import Any

import jax

from webssl_jax.config import UserError
from webssl_jax.methods.mae import MAE, View
from webssl_jax.models import sizes
from webssl_jax.models.sizes import ViTConfig
from webssl_jax.weights import configs, mae, positions, safetensors_io, tables, torch_file
from webssl_jax.weights.families import FAMILIES, Family
from webssl_jax.weights.stored import Opened, Stored, WeightsError, shown
from webssl_jax.weights.tables import Table

TORCH_FILE = "pytorch_model.bin"
# Names and sizes of published ViTs besides Web-MAE's: (width, depth): heads.
_OTHER_HEADS = {(192, 12): 3, (384, 12): 6, (768, 12): 12}
_DECODER_HEADS = {512: 16}  # original MAE, every size


@dataclasses.dataclass(frozen=True)
class Loaded:
    """Weights and the networks they belong to.

    family: one of ``families.FAMILIES``. kind: ``mae`` with a decoder, else ``encoder``.
    params: ``{"encoder": ..., "decoder": ... if kind is mae}``, our layout, float32; of numpy
      arrays from :func:`load`, of ``tables.Leaf`` from :func:`open_`.
    normalisation: (mean, std) per colour, of pixels in [0, 1].
    source: the path. dtype: of the weights in the file. left: tensors passed over on purpose.
    assumed: what of the networks nothing said, in words.
    """

    family: str
    kind: str
    vit: ViTConfig
    decoder: ViTConfig | None
    params: dict[str, Any]
    normalisation: tuple[tuple[float, ...], tuple[float, ...]]
    source: str
    dtype: str
    left: tuple[str, ...] = ()
    mask_ratio: float = 0.75
    norm_pix_loss: bool = True
    assumed: tuple[str, ...] = ()

    def method(self) -> MAE:
        """The method these weights are variables of. Where there is no decoder, it has MAE's stock
        one, for which there are no parameters: its ``features`` work, its loss does not."""
        decoder = self.decoder or dataclasses.replace(
            self.vit, width=512, depth=8, heads=16, mlp_hidden=None, position="sincos"
        )
        mean, std = self.normalisation
        return MAE(
            self.vit,
            decoder,
            mask_ratio=self.mask_ratio,
            norm_pix_loss=self.norm_pix_loss,
            view=View(image_size=self.vit.image_size),
            mean=mean,
            std=std,
        )


def load(path: str | os.PathLike, family: str | None = None, **options: Any) -> Loaded:
    """All weights as numpy arrays, after every check.

    Raises:
      WeightsError: as :func:`open_`, or when a tensor is damaged, NaN or infinite; one line that
        names it.
    """
    opened = open_(path, family, **options)
    return dataclasses.replace(
        opened, params=tables.read_all(f"{opened.source}: {opened.family}", opened.params)
    )


def open_(
    path: str | os.PathLike,
    family: str | None = None,
    heads: int | None = None,
    decoder_heads: int | None = None,
    otherwise: Any = None,
) -> Loaded:
    """Checks everything that needs no tensor (and the position tables) and opens the rest.

    Args:
      family: one of ``families.FAMILIES``; found by the names in the file when left out.
      heads, decoder_heads: for files that do not state them; go before those of a published size.
      otherwise: a method whose heads are taken where nothing else says them.

    Raises:
      UserError: if heads are given that no network can have.
      WeightsError: naming what is missing, unexpected, misshapen or contradictory; one line.
    """
    files = open_files(path)
    found = best_family(files, family)
    method, dtype, assumed = describe(files, found, heads, decoder_heads, otherwise)
    template = template_of(method)
    table = found.table(method)
    where = f"{files.path}: {table.family}"
    table = dataclasses.replace(table, family=where)
    fit = tables.compare(files.tensors, table, template)
    mae = "decoder" in found.needs
    return Loaded(
        found.name,
        "mae" if mae else "encoder",
        method.encoder,
        method.decoder if mae else None,
        tables.open_(files.tensors, table, template),
        (method.mean, method.std),
        os.fspath(path),
        dtype,
        tuple(fit.ignored),
        method.mask_ratio,
        method.norm_pix_loss,
        assumed,
    )


def open_files(path: str | os.PathLike) -> Opened:
    """Headers of whatever lies at ``path``.

    Raises:
      WeightsError: if there is nothing, or nothing whole.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise WeightsError(f"{path}: no such file or folder")
    folder = path if path.is_dir() else path.parent
    file = path
    if path.is_dir():
        names = (safetensors_io.SINGLE_FILE, safetensors_io.INDEX_FILE, TORCH_FILE)
        present = [folder / name for name in names if (folder / name).exists()]
        if not present:
            raise WeightsError(f"{path}: holds none of {', '.join(names)}")
        file = present[0]
    extra: Mapping[str, Any] = {}
    if file.suffix in (".safetensors", ".json"):
        found = safetensors_io.open_file(file)
    else:
        found, extra = _state_dict(file)
    if not found:
        raise WeightsError(f"{file}: holds no tensors")
    if file.suffix not in (".safetensors", ".json", ".bin"):
        return Opened(path, found, extra=extra)  # a .pth says all it says itself
    config, preprocessor = folder / "config.json", folder / "preprocessor_config.json"
    if not config.exists() and path.is_dir():
        raise WeightsError(f"{path}: has no config.json")
    return Opened(
        path,
        found,
        safetensors_io.parse_json(config) if config.exists() else None,
        config,
        extra,
        safetensors_io.parse_json(preprocessor) if preprocessor.exists() else {},
    )


def _state_dict(file: pathlib.Path) -> tuple[dict[str, Stored], Mapping[str, Any]]:
    """The tensors of a checkpoint (bare, or under ``model`` or ``state_dict``), and our extra."""
    checkpoint = torch_file.open_file(file)
    tensors = next(
        (checkpoint[k] for k in ("model", "state_dict") if isinstance(checkpoint.get(k), dict)),
        checkpoint,
    )
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Stored):
            raise WeightsError(f"{file}: {shown(name)} in it is no tensor")
    extra = checkpoint.get("webssl_jax", {})
    if not isinstance(extra, dict):
        raise WeightsError(f"{file}: 'webssl_jax' in it is no dict")
    return dict(tensors), extra


def best_family(files: Opened, name: str | None = None) -> Family:
    """The family that most names in the file belong to; of equals the one without a decoder.

    Raises:
      WeightsError: if ``name`` is unknown, or no name in the file belongs to any.
    """
    if name is not None:
        if name not in FAMILIES:
            raise WeightsError(f"no weight family {name!r}; there are {', '.join(FAMILIES)}")
        return FAMILIES[name]
    counts = {}
    for family in FAMILIES.values():
        table = _probe(family)
        names = tables.canonical_names(table, files.tensors, strict=False)[0]
        known = tables.names_of(table)
        counts[family.name] = sum(bool(known.fullmatch(name)) for name in names)
    order = sorted(FAMILIES.values(), key=lambda f: (-counts[f.name], len(f.needs)))
    if not counts[order[0].name]:
        some = ", ".join(shown(name) for name in list(files.tensors)[:3])
        raise WeightsError(
            f"{files.path}: its {len(files.tensors)} tensors ({some}, ...) belong to none of "
            f"{', '.join(FAMILIES)}"
        )
    return order[0]


def describe(
    files: Opened,
    family: Family,
    heads: int | None = None,
    decoder_heads: int | None = None,
    otherwise: Any = None,
) -> tuple[MAE, str, tuple[str, ...]]:
    """(the method whose networks the shapes describe, dtype of the weights, what was assumed).

    Heads are those that the file states, else those given, else of the published size, else of
    ``otherwise``, a method; see :func:`open_`.

    Raises:
      UserError: if heads are given that no network can have.
      WeightsError: if shapes are missing or make no sense, or config.json or the heads given say
        otherwise.
    """
    for name, given in (("heads", heads), ("decoder_heads", decoder_heads)):
        if given is not None and given < 1:
            raise UserError(f"{name}={given}: must be at least 1")
    shapes = _Shapes(files, family)
    facts = shapes.network("encoder")
    decoder = shapes.network("decoder") if "decoder" in family.needs else None
    said = configs.facts_of(files, facts, decoder)
    assumed: list[str] = []
    own = getattr(otherwise, "encoder", None)
    guesses = {"of the published size": _known_heads(facts), "of the run": own and own.heads}
    stated, stated_decoder = said.pop("heads", None), said.pop("decoder_heads", None)
    facts["heads"] = _heads(files, "heads", stated, heads, guesses, assumed)
    if "norm_eps" not in said:
        said["norm_eps"] = mae.NORM_EPS
        if not family.fixed_eps:
            assumed.append(
                f"norm_eps = {mae.NORM_EPS:g} (no config.json says it; transformers' default is "
                f"{configs.HF_DEFAULTS['layer_norm_eps']:g})"
            )
    if facts["heads"] is None:
        raise WeightsError(
            f"{files.path}: does not say how many heads attention has, and width "
            f"{facts['width']} with {facts['depth']} blocks is no published size; give it: heads=N"
        )
    try:
        encoder = ViTConfig(
            **facts, norm_eps=said.pop("norm_eps"), position=shapes.position(facts), init="mae"
        )
        stock = dict(width=512, depth=8, heads=16, mlp_hidden=None)
        if decoder:
            own = getattr(otherwise, "decoder", None)
            guesses = {
                "of the original MAE": _DECODER_HEADS.get(decoder["width"]),
                "of the run": own and own.heads,
            }
            stock = decoder | {
                "heads": _heads(
                    files, "decoder_heads", stated_decoder, decoder_heads, guesses, assumed
                )
            }
            if stock["heads"] is None:
                raise WeightsError(
                    f"{files.path}: does not say how many heads its decoder has, of width "
                    f"{decoder['width']}; give it: decoder_heads=N"
                )
        # The file's decoder has no patch size or image size of its own.
        method = MAE(
            encoder,
            dataclasses.replace(encoder, position="sincos", **stock),
            view=View(image_size=encoder.image_size),
            **said,
        )
    except ValueError as error:
        raise WeightsError(f"{files.path}: {error}") from None
    return method, shapes.dtype, tuple(assumed)


@functools.lru_cache(maxsize=8)
def template_of(method: MAE) -> Any:
    """The shapes of the method's parameters."""
    return jax.eval_shape(lambda: method.init(jax.random.key(0), method.batch_spec(1))).params


def size_name(c: ViTConfig) -> str:
    """``web-mae-1b`` for a published size, else a short description."""
    for size in sizes.WEB_MAE_SIZES:
        known = sizes.web_mae(size)
        if all(
            getattr(known, field) == getattr(c, field)
            for field in ("width", "depth", "heads", "patch_size", "hidden")
        ):
            return f"web-mae-{size}"
    return f"ViT of {c.depth} blocks, width {c.width}, {c.heads} heads, patch {c.patch_size}"


def _heads(
    files: Opened,
    name: str,
    stated: int | None,
    given: int | None,
    guesses: Mapping[str, int | None],
    assumed: list[str],
) -> int | None:
    """What the file states, else what was given, else the first guess, which ``assumed`` gets."""
    if stated is not None and given not in (None, stated):
        raise WeightsError(f"{files.path}: states {name} = {stated}, but {name}={given} was given")
    for number in (stated, given):
        if number is not None:
            return number
    for whose, number in guesses.items():
        if number is not None:
            assumed.append(f"{name} = {number} ({whose})")
            return number
    return None


def _known_heads(facts: Mapping[str, Any]) -> int | None:
    known = {(c.width, c.depth): c.heads for c in map(sizes.web_mae, sizes.WEB_MAE_SIZES)}
    return (known | _OTHER_HEADS).get((facts["width"], facts["depth"]))


def _probe(family: Family) -> Table:
    """The family's table for some network: the names are the same in every size."""
    some = ViTConfig(width=4, depth=1, heads=1, patch_size=1, image_size=1)
    return family.table(types.SimpleNamespace(encoder=some, decoder=some))


class _Shapes:
    """What the shapes in a file say about its networks."""

    def __init__(self, files: Opened, family: Family):
        table = _probe(family)
        self._files, self._family = files, family
        self._names, _ = tables.canonical_names(table, files.tensors)
        self._keys = {path: row.theirs for row in table.rows for path in row.paths}
        if table.constants:  # of the decoder
            self._keys["decoder/pos_embed"] = table.constants[-1].theirs
        self.dtype = self._tensor("encoder/patch_embed/kernel", 4).dtype.name

    def network(self, part: str) -> dict[str, Any]:
        """Fields of a ViTConfig, heads not among them."""
        first = "patch_embed" if part == "encoder" else "embed"
        patch = self._tensor(f"{part}/{first}/kernel", 4 if part == "encoder" else 2)
        fc1 = self._tensor(f"{part}/blocks/mlp/fc1/kernel", 2)
        prefix = self._keys[f"{part}/blocks/mlp/fc1/kernel"].split("{i}")[0]
        numbers = [
            int(name[len(prefix) :].split(".")[0])
            for name in self._names
            if name.startswith(prefix) and name[len(prefix) :].split(".")[0].isdecimal()
        ]
        if max(numbers) >= len(self._names):
            self._refuse(f"block {shown(max(numbers))} is there, most before it are not")
        facts = dict(
            width=patch.shape[0],
            depth=max(numbers) + 1,
            mlp_hidden=fc1.shape[0],
            qkv_bias=self._keys[f"{part}/blocks/attn/q/bias"].format(i=0) in self._names,
        )
        if part == "decoder":
            return facts
        side = math.isqrt(self._tensor("encoder/pos_embed", 3).shape[1] - 1)
        if side * side + 1 != self._tensor("encoder/pos_embed", 3).shape[1]:
            self._refuse(f"positions {self._tensor('encoder/pos_embed', 3).shape} are no square")
        if patch.shape[1] != 3 or patch.shape[2] != patch.shape[3]:
            self._refuse(f"patches {patch.shape} are not square patches of 3 colours")
        return facts | dict(patch_size=patch.shape[2], image_size=side * patch.shape[2])

    def position(self, facts: Mapping[str, Any]) -> str:
        """``sincos`` or ``learned``; reads the table, a few MB at most."""
        tensor = self._tensor("encoder/pos_embed", 3)
        side = facts["image_size"] // facts["patch_size"]
        if tensor.shape != (1, 1 + side * side, facts["width"]):
            self._refuse(
                f"positions {tensor.shape} do not fit {side}x{side} patches of width "
                f"{facts['width']}"
            )
        if tensor.dtype.name not in tables.DTYPES:
            self._refuse(f"positions are {tensor.dtype}")
        return positions.kind(tensor.read(), (side, side))

    def _tensor(self, path: str, axes: int) -> Stored:
        key = self._keys[path].format(i=0)
        if key not in self._names:
            self._refuse(f"missing from the file: {key}")
        tensor = self._files.tensors[self._names[key]]
        if len(tensor.shape) != axes or 0 in tensor.shape:
            self._refuse(f"of another shape: {key} is {tensor.shape}")
        return tensor

    def _refuse(self, what: str) -> None:
        raise WeightsError(f"{self._files.path}: {self._family.name}: {what}")
