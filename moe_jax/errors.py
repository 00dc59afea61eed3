"""Errors whose message says what is wrong and what helps.

Commands print the message of these without a traceback; any other error is a
defect, of this package, of a library or of a user's class, and keeps its own.
"""


class ReportedError(Exception):
  """An error that its message explains."""


class InputError(ReportedError, ValueError):
  """A value is refused: the message has the value, the rule and what exists."""
