"""A TFDS dataset made by code. TFDS wants builders in a module of their own."""

import io

import numpy as np
import tensorflow_datasets as tfds

from tests.data.image_shards import encode_image, smooth_image


def image(seed):
    return encode_image(smooth_image(np.random.default_rng(seed), 44, 40))


class OwnPictures(tfds.core.GeneratorBasedBuilder):
    """Seven pictures to train and three to test, with labels, captions and file names."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.ClassLabel(names=["cat", "dog"]),
            "captions": tfds.features.Sequence({"text": tfds.features.Text(), "id": np.int64}),
            "file": tfds.features.Text(),
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
                },
            )
