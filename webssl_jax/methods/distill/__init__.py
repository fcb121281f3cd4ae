"""A small student of a frozen encoder."""
