"""The checker of argument and result types that tests put on every function."""

from typing import Self

from beartype import BeartypeConf, BeartypeHintOverrides, beartype

# It knows what `Self` is in whole classes alone, and functions are decorated.
_WITHOUT_SELF = BeartypeConf(
  hint_overrides=BeartypeHintOverrides({Self: object})
)
checked = beartype(conf=_WITHOUT_SELF)
