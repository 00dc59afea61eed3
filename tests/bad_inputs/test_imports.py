"""Every number of a foreign config, by its declaration; files too large."""

import json
import os

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from moe_jax import interop
from moe_jax.interop.checkpoint_folder import ARCHITECTURES, open_checkpoint
from moe_jax.interop.config_keys import Number
from tests.bad_inputs import checkpoints
from tests.bad_inputs.cases import Case, check, frozen

# These values are in no kind of number, of whatever range.
NEVER = (True, 'x', [1], {'a': 1}, 10**400, -1.5)
BELOW_ZERO = (-1, -(10**30))
# These values have a meaning for the key.
MEANINGFUL = {'moe_eval_capacity_token_fraction': (*BELOW_ZERO, -1.5)}


def bad_values(number: Number):
  """Values that are refused for a key of this kind."""
  yield from NEVER
  yield from BELOW_ZERO
  if number.above or number.low > 0:
    yield 0
  if number.whole:
    yield from (0.5, 2**31)
  if not number.optional:
    yield None
  if number.below == 1:
    yield 1.0


def config_case(kind, name, value):
  def call(folder):
    config = {'model_type': kind, name: value}
    (folder / 'config.json').write_text(json.dumps(config))
    open_checkpoint(frozen(folder))

  return Case(
    f'{kind}:{name}={value!r:.20}', call, (f'{name}={value!r:.40}', 'is no ')
  )


NUMBERS = [
  config_case(kind, name, value)
  for kind, architecture in ARCHITECTURES.items()
  for name, (number, *_) in {
    **architecture.keys.honoured,
    **architecture.keys.training,
  }.items()
  if isinstance(number, Number)
  for value in bad_values(number)
  if value not in MEANINGFUL.get(name, ())
]


# There are some hundred such cases; each takes a millisecond.
@pytest.mark.parametrize('kind', sorted(ARCHITECTURES))
def test_numbers_are_refused_by_name(kind, tmp_path):
  cases = [case for case in NUMBERS if case.name.startswith(kind)]
  assert len(cases) > 100
  for i, case in enumerate(cases):
    folder = tmp_path / str(i)
    folder.mkdir()
    check(case, folder)


def test_nonfinite_weights_are_read_when_asked_for(tmp_path):
  tensors = checkpoints.tensors()
  tensors['lm_head.weight'].flat[1:3] = np.nan
  checkpoints.write(tmp_path)
  save_file(tensors, tmp_path / checkpoints.WEIGHTS)
  loaded = interop.load(tmp_path, allow_nonfinite=True)
  leaves = map(np.asarray, jax.tree.leaves(loaded.variables))
  assert sum(np.isnan(leaf).sum() for leaf in leaves) == 2


def test_files_larger_than_memory_are_not_read(tmp_path):
  checkpoints.write(tmp_path)
  with open(tmp_path / 'config.json', 'wb') as file:
    os.truncate(file.fileno(), 2**40)  # it takes no room on the disk
  with pytest.raises(ValueError, match=r'has 1099511627776 bytes, at most'):
    open_checkpoint(tmp_path)
