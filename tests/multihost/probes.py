"""As ``features``, with logistic regression and heads trained on augmented images too, which takes
minutes."""

from tests.multihost import features


def compute(folder):
    return features.compute(folder, ("knn", "probe", "linear"))
