"""One file a tool: ``python tools/NAME.py`` in a checkout, ``webssl NAME`` wherever the package is
installed. Each has ``main(argv=None)`` and a row in webssl_jax/console.py. One that imports jax
has its parser first, and ``cli.help_early`` between that and these imports."""
