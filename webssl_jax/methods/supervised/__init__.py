"""Classification with labels, as a control."""
