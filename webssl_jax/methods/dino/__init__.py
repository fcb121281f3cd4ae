"""DINOv2's self-distillation, as Web-DINO trains it: ``method.py`` first."""
