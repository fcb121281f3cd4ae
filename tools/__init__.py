"""One file a tool: ``python tools/NAME.py`` in a checkout, ``webssl NAME`` wherever the package is
installed. Each has ``main(argv=None)`` and a row in webssl_jax/console.py."""
