"""Which networks a weight file holds: what the shapes of its tensors say, and what they cannot say
(heads, epsilon, colours) by the ``config.json`` beside them, by what our own exports keep in a
``.pth``, or by the published sizes. What they say twice must agree.

Positions: a table that equals MAE's sin-cos one is not kept, as the model computes it
(``position = "sincos"``); any other becomes a parameter (``position = "learned"``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
import types
from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np

from webssl_jax.config import UserError
from webssl_jax.models import clip_sizes, sizes
from webssl_jax.models.heads import HeadConfig
from webssl_jax.models.position import INTERPOLATIONS, Grid
from webssl_jax.models.sizes import ViTConfig
from webssl_jax.models.text import TextConfig
from webssl_jax.weights import configs, dino, dinov3, positions, tables
from webssl_jax.weights.families import Family
from webssl_jax.weights.given import NOTHING, Given, parse_size
from webssl_jax.weights.networks import HEADS, Networks, template_of
from webssl_jax.weights.preprocessing import one_way, size_in_words
from webssl_jax.weights.stored import Opened, TensorOfTheirs, WeightsError, shown
from webssl_jax.weights.tables import Row, Table

# Published ViTs besides Web-SSL's: (width, depth): heads.
_OTHER_HEADS = {(192, 12): 3, (384, 12): 6, (768, 12): 12, (1408, 40): 16}
# Those of the same width and depth with others, by their kind of positions: MoCo v3's and DINOv3's.
_HEADS_BY_POSITION = {"sincos_rows": {(384, 12): 12}, "rope": {(1280, 32): 20, (4096, 40): 32}}
_DECODER_HEADS = {512: 16}  # original MAE, every size
_LAYER_SCALE = 1e-5  # stands for "there is one": its initial value is of no use any more


def describe(
    files: Opened, family: Family, given: Given = NOTHING, otherwise: Any = None
) -> tuple[Networks, str, tuple[str, ...]]:
    """(the networks that the shapes describe, dtype of the weights, what was assumed).

    Heads are those that the file states, else those given, else of the published size, else of
    ``otherwise``, a method; see ``load.open_``.

    Raises:
      WeightsError: if shapes are missing or make no sense, or config.json or the heads given say
        otherwise.
    """
    shapes = Shapes(files, family, given)
    fields: dict[str, Any] = shapes.heads() if "dino_head" in family.needs else {}
    if "encoder" not in family.needs:
        networks = Networks(**fields, head_input=shapes.head_input())
        return networks, shapes.dtype("dino_head/last_layer/v"), ()
    facts = shapes.encoder()
    decoder = shapes.decoder() if "decoder" in family.needs else None
    try:
        said = configs.facts_of(files, family.model_types, facts, decoder)
    except WeightsError:
        # Before the config is blamed: do the shapes agree among themselves?
        with contextlib.suppress(ValueError):  # nor with any network
            own_parts: dict[str, Any] = {"encoder": ViTConfig(**facts, heads=1)}
            if decoder:
                own_shape = decoder | {"position": "sincos"}
                own_parts["decoder"] = dataclasses.replace(own_parts["encoder"], **own_shape)
            check_shapes(files, family, Networks(**fields, **own_parts))
        raise
    assumed = shapes.assumed
    said |= shapes.rotation(facts["width"])
    own = getattr(otherwise, "encoder", None)
    guesses = {"of the published size": known_heads(facts), "of the run": own and own.heads}
    stated, stated_decoder = said.pop("heads", None), said.pop("decoder_heads", None)
    facts["heads"] = choose(files, "heads", stated, given.heads, guesses, assumed)
    if "rope_base" in said:
        facts["rope_base"] = said.pop("rope_base")
    if "norm_eps" not in said:
        said["norm_eps"] = family.norm_eps
        if not family.fixed_eps:
            assumed.append(f"norm_eps = {family.norm_eps:g} ({_other_eps(family)})")
    if facts["heads"] is None:
        raise WeightsError(
            f"{files.path}: does not say how many heads attention has, and width "
            f"{facts['width']} with {facts['depth']} blocks is no published size; give it: heads=N "
            "(--heads N)"
        )
    if "fc_norm" in shapes.file_name("encoder/norm/scale"):
        assumed.append(
            "the final norm is fc_norm, which was trained on the mean of patches: CLS was not"
        )
    resize, _ = position_resize(files, family, given, facts["num_registers"])
    said.pop("position_resize", None)
    try:
        encoder = fields["encoder"] = ViTConfig(
            **facts, norm_eps=said.pop("norm_eps"), position_resize=resize
        )
        if decoder:
            own = getattr(otherwise, "decoder", None)
            guesses = {
                "of the original MAE": _DECODER_HEADS.get(decoder["width"]),
                "of the run": own and own.heads,
            }
            number = choose(
                files, "decoder_heads", stated_decoder, given.decoder_heads, guesses, assumed
            )
            if number is None:
                raise WeightsError(
                    f"{files.path}: does not say how many heads its decoder has, of width "
                    f"{decoder['width']}; give it: decoder_heads=N (--decoder-heads N)"
                )
            # The file's decoder has no patch size or image size of its own.
            own_shape = decoder | {"position": "sincos", "heads": number}
            fields["decoder"] = dataclasses.replace(encoder, **own_shape)
        networks = Networks(**fields, **said)
    except ValueError as error:
        raise WeightsError(f"{files.path}: {error}") from None
    return networks, shapes.dtype("encoder/patch_embed/kernel"), tuple(assumed)


def check_given(files: Opened, family: Family, given: Given) -> None:
    """Raises:
    UserError: if something is given that no network can have, or for a network that is not there.
    """
    if given.mlp is not None and not family.towers:
        raise UserError(f"mlp={given.mlp}: {files.path} is {family.name}; leave it out")
    for name, part in (
        ("heads", "encoder"),
        ("decoder_heads", "decoder"),
        ("image_size", "encoder"),
        ("position_resize", "encoder"),
    ):
        value = getattr(given, name)
        if isinstance(value, int) and value < 1:
            raise UserError(f"{name}={value}: must be at least 1")
        if value is not None and part not in family.needs:
            raise UserError(
                f"{name}={value}: {files.path} is {family.name} and has no {part}; leave it out"
            )
    known = (None, *INTERPOLATIONS)
    if given.position_resize not in known:
        raise UserError(
            f"position_resize={given.position_resize}: is none of {', '.join(INTERPOLATIONS)}"
        )


def check_shapes(files: Opened, family: Family, networks: Networks) -> None:
    """Raises:
    WeightsError: naming the tensors of ``networks`` that have another shape in the file.
    """
    fit = tables.compare(files.tensors, family.table(networks), template_of(networks))
    tables.refuse(f"{files.path}: {family.name}", {"of another shape:": fit.misshapen})


def position_resize(
    files: Opened, family: Family, given: Given, num_registers: int
) -> tuple[str, str]:
    """(how positions follow other image sizes, why): as given, else as the file states, else as
    the family's code does it."""
    if given.position_resize is not None:
        return given.position_resize, "as given"
    if "position_resize" in files.extra:
        return files.extra["position_resize"], "as the file states"
    registers = " with registers" if num_registers and family.resize_registers else ""
    return family.resize_of(num_registers), f"as the code of {family.library} does it{registers}"


def stated_size(files: Opened) -> int | tuple[int, ...] | None:
    """The image size that a config beside the file, or our own ``.pth``, states; None where none
    does, or it makes no sense (what is wrong with it is told where configs are read)."""
    config = files.config or {}
    places = [
        (files.extra, "image_size"),
        (config, "image_size"),
        (config.get("vision_config"), "image_size"),
        (config.get("model_args"), "img_size"),
        (config.get("pretrained_cfg"), "input_size"),
    ]
    if isinstance(config.get("model_cfg"), dict):
        places.append((config["model_cfg"].get("vision_cfg"), "image_size"))
    for place, key in places:
        size = place.get(key) if isinstance(place, Mapping) else None
        if isinstance(size, str):
            try:
                size = parse_size(size)
            except ValueError as error:
                raise WeightsError(f"{files.path}: {error}") from None
        if isinstance(size, list) and len(size) >= 2 and all(type(x) is int for x in size):
            size = tuple(size[-2:])
        if isinstance(size, tuple) or type(size) is int:
            return size
    return 224 if "model_type" in config else None  # of every config of transformers


def _other_eps(family: Family) -> str:
    """Why an epsilon is assumed."""
    if not family.model_types:
        return "nothing says it"
    default = configs.default(family.model_types[0], "layer_norm_eps")
    return f"no config.json says it; transformers' default is {default:g}"


def size_name(c: ViTConfig) -> str:
    """``web-mae-1b``, ``web-dino-1b``, ``clip-l14`` or ``siglip-b16`` for a published
    size, else a short description."""
    same = ("width", "depth", "heads", "patch_size", "hidden")
    towers = clip_sizes.CLIP_SIZES if c.pre_norm else ()  # whose activation is no matter of size
    for size in clip_sizes.SIGLIP_SIZES if c.pooling == "map" else towers:
        if all(getattr(clip_sizes.vision(size), x) == getattr(c, x) for x in same):
            return size.replace("_", "-") if c.pooling == "map" else f"clip-{size}"
    for family, known in (("web-mae", _web_mae()), ("web-dino", _web_dino())):
        for size, one in known.items():
            if all(getattr(one, x) == getattr(c, x) for x in (*same, "mlp", "num_registers")):
                return f"{family}-{size}"
    return f"ViT of {c.depth} blocks, width {c.width}, {c.heads} heads, patch {c.patch_size}"


def known_heads(facts: Mapping[str, Any]) -> int | None:
    """Attention heads of the published size of that width and depth."""
    published = (*_web_dino().values(), *_web_mae().values())
    known = {(c.width, c.depth): c.heads for c in published} | _OTHER_HEADS
    known |= _HEADS_BY_POSITION.get(facts.get("position", ""), {})
    return known.get((facts["width"], facts["depth"]))


def _web_mae() -> dict[str, ViTConfig]:
    return {size: sizes.web_mae(size) for size in sizes.WEB_MAE_SIZES}


def _web_dino() -> dict[str, ViTConfig]:
    return {size: sizes.web_dino(size) for size in sizes.WEB_DINO_SIZES}


def choose(
    files: Opened,
    name: str,
    stated: Any,
    given: Any,
    guesses: Mapping[str, Any],
    assumed: list[str],
) -> Any:
    """What the file states, else what was given, else the first guess, which ``assumed`` gets."""
    if stated is not None and given not in (None, stated):
        raise WeightsError(f"{files.path}: states {name} = {stated}, but {name}={given} was given")
    for value in (stated, given):
        if value is not None:
            return value
    for whose, value in guesses.items():
        if value is not None:
            assumed.append(f"{name} = {value} ({whose})")
            return value
    return None


def probe(family: Family, mlp: str | None = None, **fields: Any) -> Table:
    """The family's table for some network that has everything: names are the same in every
    size."""
    small: dict[str, Any] = dict(
        width=4, depth=1, heads=1, mlp=mlp or family.mlps[0], norm_eps=1e-5
    )
    kinds: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "siglip": (dict(pooling="map"), dict(causal=False, pooling="last"))
    }
    image, words = kinds.get(family.towers, (dict(family.fields), {}))
    plain = ViTConfig(patch_size=1, image_size=1, **small, **image)
    everything: dict[str, Any] = dict(num_registers=1, layer_scale=_LAYER_SCALE, mask_token=True)
    some = dataclasses.replace(plain, **everything | fields)
    head = HeadConfig(1, 1)
    networks = dict(encoder=some, decoder=plain, dino_head=head, ibot_head=head)
    text = TextConfig(embedding=4, **small, **words)
    return family.table(types.SimpleNamespace(**networks, text=text, contrast="sigmoid"))


class Shapes:
    """What the shapes in a file say about its networks."""

    def __init__(self, files: Opened, family: Family, given: Given = NOTHING):
        self._files, self._family, self._given = files, family, given
        self.assumed: list[str] = []  # what the shapes leave open, in words
        named = dataclasses.replace(probe(family), family=f"{files.path}: {family.name}")
        self._names, _ = tables.canonical_names(named, files.tensors)
        self._use(probe(family))

    def _use(self, table: Table) -> None:
        self._rows: dict[str, Row] = {path: row for row in table.rows for path in row.paths}
        self._keys = {path: row.theirs for path, row in self._rows.items()}
        if table.constants:  # of the decoder
            self._keys["decoder/pos_embed"] = table.constants[-1].theirs

    def encoder(self) -> dict[str, Any]:
        """Fields of a ViTConfig; what only a config says is not among them. Reads the table of
        positions, a few MB at most."""
        patch = self._tensor("encoder/patch_embed/kernel", 4)
        if patch.shape[1] != 3 or patch.shape[2] != patch.shape[3]:
            self._refuse(f"patches {patch.shape} are not square patches of 3 colours")
        facts = self._mlp()
        bare = probe(self._family, facts["mlp"], layer_scale=None, mask_token=False)
        self._use(probe(self._family, facts["mlp"]))
        # What a family has of every network is named where a file lacks it.
        always = {path for row in bare.rows for path in row.paths}
        registers = "encoder/register_tokens"
        scales = [f"encoder/blocks/layer_scale{i}/gamma" for i in (1, 2)]
        scaled = any(path in always or self.has(path) for path in scales)
        facts |= dict(
            width=patch.shape[0],
            depth=self._depth("encoder"),
            qkv_bias=self.has("encoder/blocks/attn/q/bias"),
            patch_size=patch.shape[2],
            **self._family.fields,
            mask_token="encoder/mask_token" in always or self.has("encoder/mask_token"),
            layer_scale=_LAYER_SCALE if scaled else None,
            num_registers=self._tensor(registers, 3).shape[1] if self.has(registers) else 0,
        )
        if facts["qkv_bias"]:
            masked = self._family.key_mask.format(i=0) in self._names
            facts["key_bias"] = self.has("encoder/blocks/attn/k/bias") and not masked
        if facts.get("position") == "rope":
            return facts | {"image_size": self._any_size(patch.shape[2])}
        self._use(probe(self._family, facts["mlp"], num_registers=facts["num_registers"]))
        table = self._tensor("encoder/pos_embed", 3)
        number = table.shape[1] - self._cls_rows()
        if table.shape != (1, table.shape[1], facts["width"]) or number < 1:
            self._refuse(f"positions {table.shape} do not fit a width of {facts['width']}")
        if table.dtype.name not in tables.DTYPES:
            self._refuse(f"positions are {table.dtype}")
        grid, facts["position"] = self._grid_of_table(number, patch.shape[2], table)
        return facts | {"image_size": one_way(tuple(side * patch.shape[2] for side in grid))}

    def rotation(self, width: int) -> dict[str, Any]:
        """heads and rope_base, where the family's files have the periods of rotated positions."""
        if not self._family.periods:
            return {}
        try:
            return dinov3.rotation(self._named(self._family.periods, 1).read(), width)
        except ValueError as error:
            self._refuse(f"{self._family.periods}: {error}")

    def _any_size(self, patch: int) -> int | tuple[int, ...]:
        """The image size of a network that takes any: as given, else as the file states."""
        size = self._given.image_size or stated_size(self._files)
        if size is None:
            size = 14 * patch
            self.assumed.append(f"images of {size} pixels (others by image_size=HEIGHTxWIDTH)")
        return one_way(size)

    def _grid_of_table(self, number: int, patch: int, tensor: TensorOfTheirs) -> tuple[Grid, str]:
        """(rows and columns of ``number`` patches, kind of positions). MAE's table is computed, so
        it tells its grid itself."""
        array = tensor.read()
        if self._given.image_size is None and stated_size(self._files) is None:
            sides = (n for n in range(1, number + 1) if number % n == 0)
            grids = sorted(
                ((n, number // n) for n in sides), key=lambda grid: abs(grid[0] - grid[1])
            )
            for grid in grids:
                if (kind := positions.kind(array, grid)) != "learned":
                    return grid, kind
        grid = self.grid(number, patch)
        return grid, positions.kind(array, grid)

    def grid(self, number: int, patch: int) -> Grid:
        """Rows and columns of a table for ``number`` patches: as given, else as the file states,
        else a square, which ``assumed`` is told."""
        stated = stated_size(self._files)
        for size in (self._given.image_size, stated):
            if size is None:
                continue
            sides = size if isinstance(size, tuple) else (size, size)
            rows, columns = (side // patch for side in sides)
            if rows * columns == number and not any(side % patch for side in sides):
                return rows, columns
            if size is self._given.image_size:
                raise UserError(
                    f"image_size={size_in_words(size)}: {self._files.path} has positions of "
                    f"{number} patches of {patch} pixels"
                )
        side = math.isqrt(number)
        if side * side != number:
            self._refuse(
                f"its {number} positions make no square grid; say which: image_size=HEIGHTxWIDTH"
            )
        self.assumed.append(
            f"a square grid of {side}x{side} patches (another by image_size=HEIGHTxWIDTH)"
        )
        return side, side

    def decoder(self) -> dict[str, Any]:
        """Fields of a ViTConfig."""
        return dict(
            width=self._out("decoder/embed"),
            depth=self._depth("decoder"),
            mlp_hidden=self._out("decoder/blocks/mlp/fc1"),
            qkv_bias=self.has("decoder/blocks/attn/q/bias"),
        )

    def heads(self) -> dict[str, HeadConfig]:
        """The heads that are there, by name; the first of ``HEADS`` must be."""
        found = {}
        for name in HEADS:
            normed = f"{name}/last_layer/v" in self._keys  # else plain prototypes
            last = f"{name}/last_layer/{'v' if normed else 'kernel'}"
            if name != HEADS[0] and not self.has(last):
                continue
            prototypes, bottleneck = self._tensor(last, 2).shape
            hidden = self._first_layer(name)[0] if self._layers(name) > 1 else 1
            found[name] = HeadConfig(prototypes, bottleneck, hidden, self._layers(name), normed)
        return found

    def head_input(self) -> int:
        """The width of what goes into the heads."""
        return self._first_layer(HEADS[0])[1]

    def _layers(self, head: str) -> int:
        linear = re.compile(rf"{head}\.mlp\.\d+\.weight")
        return sum(bool(linear.fullmatch(key)) for key in self._names) or 1

    def _first_layer(self, head: str) -> tuple[int, ...]:
        return self._named(f"{dino.layer_name(head, 0, self._layers(head))}.weight", 2).shape

    def dtype(self, path: str) -> str:
        """Of the tensor that holds our parameter ``path``."""
        if not (name := self.file_name(path)):
            self._refuse(f"missing from the file: {self._keys[path]}")
        return self._files.tensors[name].dtype.name

    def file_name(self, path: str) -> str:
        """How the file calls our parameter ``path``, of the first block; "" where it is not."""
        return self._names.get(self._keys[path].format(i=0), "") if path in self._keys else ""

    def _mlp(self) -> dict[str, Any]:
        """Kind and hidden width of the encoder's MLPs. Where both kinds bear the same names, the
        first layer's shape says whether it is packed."""
        kinds: list[tuple[tuple[bool, bool], dict[str, Any]]] = []
        for mlp, first, last in (("gelu", "fc1", "fc2"), ("swiglu", "w1", "w3")):
            self._use(probe(self._family, mlp))
            first, last = (f"encoder/blocks/mlp/{name}/kernel" for name in (first, last))
            if not self.has(first):
                continue
            if mlp == "swiglu" and len(self._rows[first].paths) == 1:  # a name of its own says it
                kinds.clear()
            packed, ends = len(self._rows[first].paths), self._tensor(last, 2).shape
            rows = self._out(first.removesuffix("/kernel"))
            wrong = (rows != packed * ends[1], rows // packed not in ends)  # or one is transposed
            kinds.append((wrong, dict(mlp=mlp, mlp_hidden=rows // packed)))
        if not kinds:
            self._use(probe(self._family))
            self._tensor("encoder/blocks/mlp/fc1/kernel", 2)
        return min(kinds, key=lambda kind: kind[0])[1]

    def _out(self, layer: str) -> int:
        """Outputs of a linear layer: its bias tells them however its matrix lies."""
        if self.file_name(f"{layer}/bias"):
            return self._tensor(f"{layer}/bias", 1).shape[0]
        return self._tensor(f"{layer}/kernel", 2).shape[0]

    def _depth(self, part: str) -> int:
        prefix = self._keys[f"{part}/blocks/norm1/scale"].split("{i}")[0]
        rest = (name[len(prefix) :] for name in self._names if name.startswith(prefix))
        numbers = [int(x.split(".")[0]) for x in rest if x.split(".")[0].isdecimal()]
        if not numbers:
            self._refuse(f"missing from the file: {prefix}0")
        if max(numbers) >= len(self._names):
            self._refuse(f"block {shown(max(numbers))} is there, most before it are not")
        return max(numbers) + 1

    def _cls_rows(self) -> int:
        """1 where the position table begins with the CLS token's row, else 0."""
        if self._family.fields.get("pooling") == "mean":
            return 0
        theirs = self._rows["encoder/pos_embed"].transform.to_theirs(np.empty((1, 2, 1)))
        return theirs.shape[1] - 1

    def has(self, path: str) -> bool:
        """Whether it is there, of any block."""
        if path not in self._keys:
            return False
        key = re.escape(self._keys[path]).replace(r"\{i\}", r"\d+")
        return any(re.fullmatch(key, name) for name in self._names)

    def _tensor(self, path: str, axes: int) -> TensorOfTheirs:
        return self._named(self._keys[path].format(i=0), axes)

    def _named(self, key: str, axes: int) -> TensorOfTheirs:
        if key not in self._names:
            self._refuse(f"missing from the file: {key}")
        tensor = self._files.tensors[self._names[key]]
        if len(tensor.shape) != axes or 0 in tensor.shape:
            self._refuse(f"of another shape: {key} is {tensor.shape}")
        return tensor

    def _refuse(self, what: str) -> NoReturn:
        raise WeightsError(f"{self._files.path}: {self._family.name}: {what}")
