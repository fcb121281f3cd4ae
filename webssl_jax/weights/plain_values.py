"""Names of the plain values that programs pickle beside their tensors: flags, paths, dates, numbers
of NumPy. ``torch_file.py`` reads past them; none is ever called or made."""

from __future__ import annotations

import re

# Made by a call.
CALLED = re.compile(
    r"""numpy\.(_?core\.multiarray\.(scalar|_reconstruct)|dtype)|numpy\.(float|u?int|bool)\w*
    |_codecs\.encode|torch\.(Size|device)
    |pathlib(\._local)?\.(Pure)?(Posix|Windows)?Path
    |collections\.(OrderedDict|defaultdict|Counter|deque)
    |(__builtin__|builtins)\.(set|frozenset|list|dict|tuple|complex|bytearray|slice|x?range)
    |datetime\.(datetime|date|time|timedelta|timezone)|decimal\.Decimal|uuid\.UUID""",
    re.VERBOSE,
)
# Made as objects.
OBJECTS = re.compile(
    r"""argparse\.Namespace|types\.SimpleNamespace|easydict\.EasyDict|yacs\.config\.CfgNode
    |omegaconf\.[\w.]+|(pytorch_)?lightning[\w.]*\.AttributeDict|uuid\.SafeUUID""",
    re.VERBOSE,
)
# Named, and neither called nor made.
_NAMED = re.compile(
    r"numpy\.(ndarray|dtypes\.\w+)|typing\.\w+|(__builtin__|builtins)\.(int|float|str|bool|bytes)"
    r"|torch\.(b?float\d+\w*|u?int\d+|bool|half|double|long|strided|contiguous_format)"
)


def is_known(name: str) -> bool:
    """Whether ``MODULE.NAME`` is one of them, or of what they are made from."""
    return any(kind.fullmatch(name) for kind in (CALLED, OBJECTS, _NAMED))
