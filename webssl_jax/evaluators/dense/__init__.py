"""Dense evaluations: a figure for each pixel of an image (classes, depth) from frozen patch
features, by DINOv2's protocols (arXiv 2304.07193, section 7.4)."""
