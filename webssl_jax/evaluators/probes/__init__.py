"""Classifiers on frozen features: k-NN and logistic regression, beside trivial features."""
