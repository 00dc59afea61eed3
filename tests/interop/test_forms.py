"""Layouts of parameters, against numpy's own reshapes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_jax.interop.mapping import Form

H, D, M, E, F = 3, 4, 5, 2, 7


def reader(tensor, sizes=None):
  """A source of a tensor that records how much of it is read."""

  def get(index):
    part = tensor[index].copy()
    if sizes is not None:
      sizes.append(part.size)
    return part

  return get


CASES = {
  '(H D) M -> M H D': (
    (H * D, M), (M, H, D), lambda x: x.reshape(H, D, M).transpose(2, 0, 1),
  ),
  'M (H D) -> H D M': (
    (M, H * D), (H, D, M), lambda x: x.reshape(M, H, D).transpose(1, 2, 0),
  ),
  '(H D) -> H D': ((H * D,), (H, D), lambda x: x.reshape(H, D)),
  'F M -> M F': ((F, M), (M, F), lambda x: x.T),
  'E (0/2 F) M -> E M F': (
    (E, 2 * F, M), (E, M, F), lambda x: x[:, :F].swapaxes(1, 2),
  ),
  'E (1/2 F) M -> E M F': (
    (E, 2 * F, M), (E, M, F), lambda x: x[:, F:].swapaxes(1, 2),
  ),
  'E M (F 0/2) -> E M F': ((E, M, 2 * F), (E, M, F), lambda x: x[:, :, ::2]),
  'E M (F 1/2) -> E M F': ((E, M, 2 * F), (E, M, F), lambda x: x[:, :, 1::2]),
}  # fmt: skip


@pytest.mark.parametrize('text', CASES)
@given(data=st.data())
def test_every_slice_is_that_of_the_whole(text, data):
  their_shape, shape, convert = CASES[text]
  form = Form.parse(text)
  assert form.their_shape(shape) == their_shape
  tensor = np.random.default_rng(0).normal(size=their_shape)
  converted = convert(tensor)
  index = []
  for size in shape:
    low = data.draw(st.integers(0, size - 1))
    index.append(slice(low, data.draw(st.integers(low + 1, size))))
  index = tuple(index)
  part = form.read(reader(tensor), shape, index)
  np.testing.assert_array_equal(part, converted[index])
  assert form.num_blocks == (2 if '/' in text else 1)
  rewritten = np.zeros_like(tensor)
  form.write(rewritten, converted)
  assert np.count_nonzero(rewritten) == converted.size
  np.testing.assert_array_equal(convert(rewritten), converted)


def test_no_more_is_read_than_the_slice_needs():
  tensor = np.zeros((H * D, M))
  sizes = []
  index = (slice(1, 3), slice(2, 3), slice(0, D))
  Form.parse('(H D) M -> M H D').read(reader(tensor, sizes), (M, H, D), index)
  assert sizes == [D * 2]
