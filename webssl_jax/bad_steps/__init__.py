"""Steps that went wrong: ``saving.py`` keeps them, ``replay.py`` runs them again."""
