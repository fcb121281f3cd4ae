"""Cloud TPUs through gcloud: what ``tools/tpu.py`` does. Nothing here imports jax's devices."""
