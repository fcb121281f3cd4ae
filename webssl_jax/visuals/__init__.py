"""Pictures worth looking at: arrays in, (H, W, 3) uint8 out. They know no model, no method and no
file layout."""

from webssl_jax.visuals.png import save_png
from webssl_jax.visuals.reconstruction import panel
from webssl_jax.visuals.sheets import crop_sheet, image_grid

__all__ = ["crop_sheet", "image_grid", "panel", "save_png"]
