"""The tools, which lie in tools/ at the top of the repository.

This file stands for that folder in a checkout. A wheel has the folder itself here (setup.py).
"""

import pathlib

__path__ = [str(pathlib.Path(__file__).resolve().parents[2] / "tools")]
