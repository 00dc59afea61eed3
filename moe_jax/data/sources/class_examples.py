"""Arrays that belong to classes, as sources give them to tasks.

Not here: the source that gives them (`ClassSource` in `contract.py`).
"""

from typing import NamedTuple

import numpy as np

from moe_jax.errors import InputError


class Examples(NamedTuple):
  """Arrays and the classes to which they belong.

  Attributes:
    features: float32 [N, ...], the arrays.
    labels: int32 [N], indices of classes.
  """

  features: np.ndarray
  labels: np.ndarray


def checked_examples(
  features: np.ndarray, labels: np.ndarray, where: str
) -> Examples:
  """The examples of these arrays, in the types of `Examples`.

  Args:
    features: Numbers [N, ...].
    labels: Integers [N].
    where: Name of the arrays, for messages.

  Raises:
    ValueError: The arrays are empty, or not of these types and shapes; or a
      value would be another one in its new type, or is not finite.
  """
  features, labels = np.asarray(features), np.asarray(labels)
  if (
    labels.ndim != 1
    or labels.dtype.kind not in 'iu'
    or features.ndim < 2
    or features.dtype.kind not in 'iuf'
  ):
    raise InputError(
      f'{where}: labels {labels.shape} of {labels.dtype} must be integers [N], '
      f'features {features.shape} of {features.dtype} integers or floats '
      '[N, ...]'
    )
  if len(features) != len(labels) or not features.size:
    raise InputError(
      f'{len(features)} features and {len(labels)} labels of {where}, each '
      f'feature of {features.shape[1:]}, must be as many, and not empty'
    )
  low, high = int(labels.min()), int(labels.max())
  if low < 0 or high > np.iinfo(np.int32).max:
    raise InputError(
      f'{where}: labels from {low} to {high} are no int32 from 0'
    )
  with np.errstate(over='ignore'):  # what becomes infinite is reported here
    features = features.astype(np.float32)
  wrong = np.argwhere(~np.isfinite(features))
  if len(wrong):
    raise InputError(
      f'{where}: {len(wrong)} values of the features are not finite in '
      f'float32, the first at {wrong[0].tolist()}'
    )
  return Examples(features, labels.astype(np.int32))
