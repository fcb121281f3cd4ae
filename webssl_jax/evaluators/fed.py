"""What the network is fed at step 0, beside the records it was made from: crops, and of pairs the
caption that was drawn and its tokens. A wrong crop, colour or text is seen here first."""

from __future__ import annotations

import numpy as np

from webssl_jax.data import records, tokens
from webssl_jax.data.captioned import CaptionedView
from webssl_jax.data.pipeline import Batch, Source
from webssl_jax.methods import distortions
from webssl_jax.methods.base import Method
from webssl_jax.visuals import crop_sheet
from webssl_jax.visuals.pairs import FedText, fed_sheet

_ROOM = 4096  # tokens of a caption that is counted


def picture(source: Source, batch: Batch, method: Method, images: int = 12) -> np.ndarray:
    """(H, W, 3) uint8 of the first ``images`` rows of a batch that are what was due."""
    rows = np.flatnonzero(~batch["substituted"])[:images]
    drawn = [records.decode(source[int(index)]) for index in batch["record"][rows]]
    originals = [method.preprocess(record.image) for record in drawn]
    view = method.train_view()
    if isinstance(view, CaptionedView):
        texts = [_text(record, ids, view) for record, ids in zip(drawn, batch["tokens"][rows])]
        return fed_sheet(originals, batch["image"][rows], texts)
    views = {}
    for name, spec in method.batch_spec(1).items():
        if spec.dtype != np.uint8:
            continue
        crops = np.asarray(distortions.seen({key: x[rows] for key, x in batch.items()}, name))
        if crops.ndim == 4:
            views["crop" if name == "image" else name] = crops
            continue
        for i in range(crops.shape[1]):
            views[f"{name.removesuffix('_crops')} {i + 1}"] = crops[:, i]
    return crop_sheet(np.stack(originals), views)


def _text(record: records.Record, ids: np.ndarray, view: CaptionedView) -> FedText:
    """The caption that has these tokens, and what they stand for."""
    made = tokens.Tokenizer(view.context, view.pad)(record.captions)
    same = [text for text, row in zip(record.captions, made) if (row == ids).all()]
    whole = tokens.pieces(tokens.Tokenizer(_ROOM)(same[:1])[0]) if same else []
    found = tokens.pieces(ids)
    return FedText(same[0] if same else "", tuple(found), len(whole) - len(found))
