"""Errors that end a command with one line."""


class BadInput(ValueError):
    """A checkpoint, calibration or option cannot be used; the message names file, value, rule."""
