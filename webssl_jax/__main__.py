"""``python -m webssl_jax``: see console.py."""

from webssl_jax.console import main

if __name__ == "__main__":
    main()
