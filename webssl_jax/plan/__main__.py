"""``python -m webssl_jax.plan``: see training.py."""

from webssl_jax import cli
from webssl_jax.plan.training import main

if __name__ == "__main__":
    cli.run(main)
