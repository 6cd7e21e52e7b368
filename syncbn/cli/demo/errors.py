"""The error that is the user's to mend."""


class InputError(ValueError):
    """What the user gave cannot be used; the message says why, and needs no traceback."""
