"""XLA's optimisations are off in this folder."""

from tests.quick_compilation import quick_compilation  # noqa: F401
