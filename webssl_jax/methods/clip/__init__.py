"""Language supervision, CLIP's and SigLIP's: ``method.py`` first."""
