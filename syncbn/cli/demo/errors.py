"""The error for wrong input by the user."""


class InputError(ValueError):
    """The user's input cannot be used. The message says why; no traceback is needed."""
