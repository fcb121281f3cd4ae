"""The shipped configs: one file an experiment, and common.py, which they share.

    webssl train --config web_dino:size=7b --workdir RUN             by name, from any folder
    webssl train --config mine/web_dino.py:size=7b --workdir RUN     a file of your own, by its path

The package is ``webssl_jax.configs`` in a checkout, in an editable install and in a wheel. For more
than ``--config.key=value`` can change, write a file with ``get_config(arg)`` in your own folder:

    from webssl_jax.configs import web_dino

    def get_config(arg=None):
        config = web_dino.get_config(arg)
        config.method.koleo_weight = 0.05
        return config

A key that no config has is refused: start from a shipped config or from common.base(). Or copy
files from here. They import each other as ``from .common import base``, so a copy gets the
common.py beside it, and a copy without one says so. The rules: webssl_jax/config_files.py.
"""
