"""A TFDS dataset made by code. TFDS wants builders in a module of their own."""

import io

import numpy as np
import tensorflow_datasets as tfds

from tests.data.image_shards import encode_image, smooth_image


def image(seed):
    return encode_image(smooth_image(np.random.default_rng(seed), 44, 40))


def mask_file(seed):
    """The PNG of a mask, as no encoder of ours writes it."""
    return encode_image(mask(seed), compress_level=1)


def mask(seed):
    """(40, 44) classes of an image's pixels."""
    return np.random.default_rng(seed).integers(0, 3, (40, 44), np.uint8)


class OwnPictures(tfds.core.GeneratorBasedBuilder):
    """Seven pictures to train and three to test, with labels, captions, file names and masks."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.ClassLabel(names=["cat", "dog"]),
            "captions": tfds.features.Sequence({"text": tfds.features.Text(), "id": np.int64}),
            "file": tfds.features.Text(),
            "mask": tfds.features.LabeledImage(labels=3, shape=(None, None, 1)),
            "relief": tfds.features.Tensor(shape=(40, 44, 1), dtype=np.uint16),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, manager):
        return {"train": self._generate_examples(0, 7), "test": self._generate_examples(7, 10)}

    def _generate_examples(self, first, end):
        for i in range(first, end):
            yield (
                i,
                {
                    "image": io.BytesIO(image(i)),
                    "label": i % 2,
                    "captions": [{"text": f"größe {i}", "id": 1}, {"text": "second", "id": 2}],
                    "file": f"file {i}",
                    "mask": io.BytesIO(mask_file(i)),
                    "relief": 300 * mask(i)[:, :, None].astype(np.uint16),
                },
            )
