"""The type checker that tests apply to functions with array types."""

import importlib.util
import pathlib
import re
from typing import Self

from beartype import BeartypeConf, BeartypeHintOverrides, beartype

# The checker knows `Self` only in whole classes, and functions are decorated
# here.
_WITHOUT_SELF = BeartypeConf(
  hint_overrides=BeartypeHintOverrides({Self: object})
)
checked = beartype(conf=_WITHOUT_SELF)
# `is_whole` is no type.
_ARRAY_TYPE = re.compile(
  r'jaxtyping|moe_jax\.shapes import(?! is_whole$)', re.M
)


def modules_with_array_types(package: str) -> list[str]:
  """Names of a package's modules whose signatures have array shapes.

  A checked call takes up to twenty times as long as one that is not: reading a
  config, which has no arrays, would take most of the time of the tests.
  """
  root = pathlib.Path(importlib.util.find_spec(package).origin).parent
  return [
    '.'.join([package, *path.relative_to(root).with_suffix('').parts])
    for path in sorted(root.rglob('*.py'))
    if _ARRAY_TYPE.search(path.read_text(encoding='utf-8'))
  ]
