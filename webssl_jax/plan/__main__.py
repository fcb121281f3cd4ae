"""``python -m webssl_jax.plan``: a training step (training.py), or with --eval an extraction of
features (extraction.py)."""

from webssl_jax import cli

if __name__ == "__main__":
    cli.start("webssl_jax.plan.command")
