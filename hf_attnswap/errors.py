"""The one exception of wrong use: its message is one sentence with the value, the place and what to do."""


class UsageError(ValueError):
    """What was asked for cannot be: an unknown name, an unfit option, a model or file that is not what it should be."""
