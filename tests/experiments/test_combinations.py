"""Random combinations: what is drawn, what can run, and a bug that is found."""

import random

import pytest

from experiments import combinations
from moe_jax.errors import InputError
from tests import programs

# A combination that runs, of which one value at a time is changed.
FIRST = (
  *('data=2 expert=4', 'gather', 'default', 'none', 'top-2', 'tight', 'two'),
  *('none', 'loop', 'whole'),
)


def test_only_rules_of_options_refuse_a_value():
  # An option that is renamed would be counted as refused ever after.
  refused = {}
  for i, values in enumerate(combinations.FACTORS.values()):
    for name in values:
      drawn = (*FIRST[:i], name, *FIRST[i + 1 :])
      try:
        combinations.options_of(drawn).model.build()
      except InputError as error:
        refused[name] = str(error)
  assert refused.keys() == {'dropless', 'biased'}
  assert 'has no slots' in refused['dropless']
  assert 'global_balance_weight=0.1' in refused['biased']


def test_pairs_that_were_not_tried_are_drawn():
  rng, tried, new = random.Random(0), set(), []
  for _ in range(30):
    drawn = combinations.pairs(combinations.draw(rng, tried))
    new.append(len(drawn - tried))
    tried |= drawn
  assert new[0] == 45 and sum(new) > 500


@pytest.mark.slow
def test_a_planted_bug_is_found():
  command = '-m', 'experiments.combinations', '--plant=slices'
  process = programs.run(*command, f'--only={", ".join(FIRST)}')
  assert process.returncode == 1, process.stderr
  assert 'WRONG: loss' in process.stdout and '1 differ' in process.stdout
