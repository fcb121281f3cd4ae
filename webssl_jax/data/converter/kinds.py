"""The kinds of input of make_records: the flags of each, how its units are found, its reader."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from webssl_jax import cli
from webssl_jax.data.converter import conversations_reader as conversations
from webssl_jax.data.converter import flags, items, layouts
from webssl_jax.data.converter import folder_reader as folders
from webssl_jax.data.converter import parquet_reader as parquet
from webssl_jax.data.converter import records_reader as record_sets
from webssl_jax.data.converter import tar_reader as tars
from webssl_jax.data.converter import tfds_reader as tfds
from webssl_jax.telemetry.progress import Progress

Facts = dict[str, Any]  # what listing found out and the reader needs; plain JSON, kept in the plan


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of input. ``unit`` is what sizes of its units count, ``annotation`` what names the
    place of an annotation."""

    help: str
    unit: str
    annotation: str
    add_flags: Callable[[cli.ArgumentParser], None]
    find: Callable[[Any], tuple[Facts, list[items.Unit]]]
    reader: Callable[[Any, Facts], items.Reader]


def wanted(args: Any) -> items.Wanted:
    """(name, place) of each ``--annotation``."""
    pairs = (text.split("=", 1) for text in args.annotation)
    return tuple((name, where) for name, where in pairs)


def _folder_flags(parser: cli.ArgumentParser) -> None:
    parser.add_argument("--input", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--label-from",
        choices=folders.LABELS,
        default="none",
        help="folder: the first folder below --input",
    )
    parser.add_argument(
        "--captions",
        choices=folders.CAPTIONS,
        default="none",
        help="sidecar-txt: each line of NAME.txt beside NAME.jpg",
    )
    parser.add_argument(
        "--test-fraction",
        type=flags.fraction,
        default=0.0,
        metavar="F",
        help="put this share of the images, chosen by a digest of the key, into a split named test",
    )


def _folder_find(args: Any) -> tuple[Facts, list[items.Unit]]:
    progress = Progress(None, "listing", "images")
    units = folders.list_folder(args.input, progress.update, wanted(args), args.captions)
    progress.close()
    return {"root": str(args.input), "source": args.input.name or "images"}, units


def _folder_reader(args: Any, facts: Facts) -> items.Reader:
    return folders.FolderReader(
        **facts, label_from=args.label_from, captions=args.captions, annotations=wanted(args)
    )


def _tar_flags(parser: cli.ArgumentParser) -> None:
    _add_patterns(parser)
    _add_members(parser)


def _tar_find(args: Any) -> tuple[Facts, list[items.Unit]]:
    root, units = tars.list_tars(args.input, args.cut_names)
    return {"root": str(root), "source": root.name}, units


def _tar_reader(args: Any, facts: Facts) -> items.Reader:
    places = tuple((name, _extension(where)) for name, where in wanted(args))
    return tars.TarReader(
        **facts,
        label_field=args.label_field,
        annotations=places,
        image_member=args.image_member and _extension(args.image_member),
        caption_members=tuple(map(_extension, args.caption_member)),
        caption_fields=tuple(args.caption_field),
        cut_names=args.cut_names,
        metadata=not args.no_metadata,
    )


def _extension(text: str) -> str:
    return text.lstrip(".").lower()


def _metaclip_flags(parser: cli.ArgumentParser) -> None:
    parser.add_argument("--input", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--first", type=flags.natural, metavar="N", help="first shard (default: all)"
    )
    parser.add_argument("--last", type=flags.natural, metavar="N", help="last shard (default: all)")
    _add_members(parser)


def _metaclip_find(args: Any) -> tuple[Facts, list[items.Unit]]:
    units = tars.list_metaclip(args.input, args.first, args.last, args.cut_names)
    return {"root": str(args.input), "source": args.input.name}, units


def _parquet_flags(parser: cli.ArgumentParser) -> None:
    _add_patterns(parser)
    parser.add_argument(
        "--image-column",
        default="image",
        metavar="NAME",
        help="bytes, paths, or Hugging Face's struct of both",
    )
    parser.add_argument(
        "--image-root",
        type=Path,
        metavar="DIR",
        help="what paths are relative to; none outside is read (default: the parquet's folder)",
    )
    parser.add_argument("--caption-column", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--key-column", metavar="NAME", help="default: file and row")
    parser.add_argument("--label-column", metavar="NAME", help="a.b: the field b of objects a")
    _add_no_metadata(parser, "the other columns of texts, numbers and dates")


def _columns(args: Any) -> parquet.Columns:
    captions = tuple(args.caption_column)
    key, label = args.key_column, args.label_column
    return parquet.Columns(
        args.image_column, captions, key, label, wanted(args), not args.no_metadata
    )


def _parquet_find(args: Any) -> tuple[Facts, list[items.Unit]]:
    root, units = parquet.list_parquet(args.input, _columns(args))
    image_root = os.path.abspath(args.image_root or root)
    return {"root": str(root), "source": root.name, "image_root": image_root}, units


def _parquet_reader(args: Any, facts: Facts) -> items.Reader:
    return parquet.ParquetReader(**facts, columns=_columns(args))


def _tfds_flags(parser: cli.ArgumentParser) -> None:
    parser.add_argument(
        "--input", required=True, metavar="DIR|NAME", help="a prepared folder, or coco/2017"
    )
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="where datasets by name lie")
    parser.add_argument(
        "--tfds-split", default="train", metavar="SPLIT", help="train, train[:10%%], train+test"
    )
    parser.add_argument("--image-feature", metavar="PATH", help="default: the only one there is")
    parser.add_argument(
        "--caption-feature", nargs="+", default=[], metavar="PATH", help="captions/text, say"
    )
    parser.add_argument("--key-feature", metavar="PATH", help="default: file and number")
    parser.add_argument(
        "--label-feature", metavar="PATH", help="default: the class label, if there is one"
    )


def _tfds_find(args: Any) -> tuple[Facts, list[items.Unit]]:
    captions, key, label = tuple(args.caption_feature), args.key_feature, args.label_feature
    asked = tfds.Features(args.image_feature, captions, key, label, wanted(args))
    root, source, features, units = tfds.list_tfds(
        args.input, args.data_dir, args.tfds_split, asked
    )
    facts = {"root": str(root), "source": source, "features": dataclasses.asdict(features)}
    return facts, units


def _tfds_reader(args: Any, facts: Facts) -> items.Reader:
    lists = {"captions": facts["features"]["captions"], "annotations": wanted(args)}
    features = facts["features"] | {name: tuple(value) for name, value in lists.items()}
    return tfds.TfdsReader(**facts | {"features": tfds.Features(**features)})


def _records_flags(parser: cli.ArgumentParser) -> None:
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="PATTERN", help="globs, folders, or files"
    )
    parser.add_argument("--keys", type=Path, metavar="FILE", help="keep only these, one a line")
    parser.add_argument("--without", type=Path, metavar="FILE", help="remove these, one a line")
    parser.add_argument(
        "--by",
        default="key",
        metavar="FIELD",
        help="what the lines are: key, source, label, or a field such as meta.url (default: key)",
    )
    limits: dict[str, Any] = {
        "action": "append",
        "type": flags.limit,
        "default": [],
        "metavar": "FIELD=NUMBER",
    }
    what = "drop records whose field, such as meta.score, is {} it or no number"
    parser.add_argument("--min", help=what.format("below"), **limits)
    parser.add_argument("--max", help=what.format("above"), **limits)


def _records_find(args: Any) -> tuple[Facts, list[items.Unit]]:
    for file in filter(None, (args.keys, args.without)):
        record_sets.read_list(str(file))
    return {"source": ""}, record_sets.list_records(args.input)


def _records_reader(args: Any, facts: Facts) -> items.Reader:
    keys, without = str(args.keys or ""), str(args.without or "")
    choice = record_sets.Choice(keys, without, args.by, tuple(args.min), tuple(args.max))
    return record_sets.RecordsReader(**facts, choice=choice)


def _add_patterns(parser: cli.ArgumentParser) -> None:
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="GLOB", help="files; ** goes into folders"
    )


def _layout_flags(parser: cli.ArgumentParser) -> None:
    parser.set_defaults(keep_duplicates=True)  # a published figure is of all images
    parser.add_argument(
        "--layout", choices=layouts.LAYOUTS, required=True, help="whose; pairs: of --list"
    )
    parser.add_argument("--input", type=Path, required=True, metavar="DIR|ZIP")
    parser.add_argument(
        "--part", default="train", help="of the data set: train, val, trainaug, v2 (default: train)"
    )
    parser.add_argument(
        "--list",
        type=Path,
        metavar="FILE",
        help="of pairs: an image and its depth a line; of imagenet's val without folders: "
        "LOC_val_solution.csv, or the devkit's folder",
    )
    parser.add_argument(
        "--annotation-root", type=Path, metavar="DIR", help="of pairs: if depths lie elsewhere"
    )


def _layout_find(args: Any) -> tuple[Facts, list[items.Unit]]:
    root, other, units = layouts.list_layout(
        args.layout, args.input, args.part, args.list, args.annotation_root
    )
    annotation = {"pairs": "depth", "imagenet": ""}.get(args.layout, "mask")
    source = args.input.stem if args.layout == "pairs" else args.layout
    return {"root": root, "other": other, "source": source, "annotation": annotation}, units


def _layout_reader(args: Any, facts: Facts) -> items.Reader:
    return layouts.PairReader(**facts)


def _conversations_flags(parser: cli.ArgumentParser) -> None:
    parser.set_defaults(keep_duplicates=True)  # many conversations are about one image
    _add_patterns(parser)
    parser.add_argument(
        "--images",
        required=True,
        metavar="DIR|GLOB",
        help="what the paths of images are relative to: a folder, or plain tars",
    )
    _add_no_metadata(parser, "the other fields of a conversation")


def _conversations_find(args: Any) -> tuple[Facts, list[items.Unit]]:
    progress = Progress(None, "listing", "conversations")
    root, images, units = conversations.list_conversations(args.input, args.images, progress.update)
    progress.close()
    return {"root": str(root), "source": root.name, "images": images}, units


def _conversations_reader(args: Any, facts: Facts) -> items.Reader:
    return conversations.ConversationsReader(**facts, metadata=not args.no_metadata)


def _add_members(parser: cli.ArgumentParser) -> None:
    """What is taken from a sample of a tar."""
    parser.add_argument(
        "--image-member", metavar="EXT", help="extension of the image, such as rgb.jpg"
    )
    parser.add_argument(
        "--caption-member",
        nargs="+",
        default=[],
        metavar="EXT",
        help="extensions of texts that are captions (default: txt)",
    )
    parser.add_argument(
        "--caption-field",
        nargs="+",
        default=[],
        metavar="NAME",
        help="fields of the json that are captions (default: caption, captions, texts)",
    )
    parser.add_argument(
        "--label-field", metavar="NAME", help="field of the json that is the label (beside .cls)"
    )
    parser.add_argument(
        "--cut-names",
        choices=tars.CUTS,
        default=tars.CUTS[0],
        help="where the name that makes members a sample ends",
    )
    _add_no_metadata(parser, "the rest of the json")


def _add_no_metadata(parser: cli.ArgumentParser, what: str) -> None:
    parser.add_argument(
        "--no-metadata", action="store_true", help=f"do not keep {what} as the annotation meta"
    )


KINDS = {
    "folder": Kind(
        "a folder tree of image files",
        "images",
        "a path relative to --input with {path}, {folder} or {stem} of the image in it",
        _folder_flags,
        _folder_find,
        _folder_reader,
    ),
    "tar": Kind(
        "tars of img2dataset or webdataset; plain, gzip or zstd",
        "kB",
        "a member's extension, such as seg.png",
        _tar_flags,
        _tar_find,
        _tar_reader,
    ),
    "metaclip": Kind(
        "MetaCLIP's tars DIR/{n %% 100}/{n}.tar",
        "kB",
        "a member's extension, such as json",
        _metaclip_flags,
        _metaclip_find,
        _tar_reader,
    ),
    "parquet": Kind(
        "parquet files with images or their paths",
        "rows",
        "a column",
        _parquet_flags,
        _parquet_find,
        _parquet_reader,
    ),
    "tfds": Kind(
        "a TFDS dataset, without TensorFlow",
        "examples",
        "the path of a feature",
        _tfds_flags,
        _tfds_find,
        _tfds_reader,
    ),
    "layout": Kind(
        "ADE20K, VOC2012, Cityscapes, or lists of images and depths, as they are distributed",
        "images",
        "",
        _layout_flags,
        _layout_find,
        _layout_reader,
    ),
    "conversations": Kind(
        "conversations about images, as LLaVA and Cambrian-1 publish them (jsonl, json)",
        "conversations",
        "",
        _conversations_flags,
        _conversations_find,
        _conversations_reader,
    ),
    "records": Kind(
        "records: merges, selects, removes",
        "records",
        "",
        _records_flags,
        _records_find,
        _records_reader,
    ),
}
