"""DINOv2 without prototypes: the coding rate keeps features apart."""
