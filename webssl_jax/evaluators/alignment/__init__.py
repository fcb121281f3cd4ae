"""Whether encoders of images and models of language see the same things as alike (the platonic
representation hypothesis: Huh et al., arXiv 2405.07987)."""
