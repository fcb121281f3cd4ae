"""As ``features``, with the linear probe too, which takes a minute."""

from tests.multihost import features


def compute(folder):
    return features.compute(folder, ("knn", "probe"))
