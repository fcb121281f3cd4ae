"""The commands of tools/curate.py: their flags, what they call, what they print."""

from webssl_jax.curation.commands import budget, captions, features, scoring

COMMANDS = captions.COMMANDS | scoring.COMMANDS | features.COMMANDS | budget.COMMANDS
