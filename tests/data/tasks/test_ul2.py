"""The mixture of denoisers of UL2."""

import collections

import numpy as np
import pytest

from moe_jax.data.layouts import RowShape
from moe_jax.data.tasks import texts
from moe_jax.data.tokenizers import Bytes

EOS = Bytes.eos_id


def make_task(denoisers=texts.DENOISERS, shape=RowShape(120, 110)):
  task = texts.Ul2Task(denoisers=tuple(denoisers))
  return task.windows(task.vocabulary(Bytes(), shape), shape)


MODES = {
  mode: texts.Ul2Task()
  .vocabulary(Bytes(), RowShape(120))
  .token_id(texts.mode_name(mode))
  for mode in texts.MODES
}


def test_the_papers_seven():
  # Table 1 of the paper has two regular, one sequential and four extreme
  # denoisers.
  modes = collections.Counter(mode for mode, *_ in texts.DENOISERS)
  assert modes == {'R': 2, 'S': 1, 'X': 4}
  assert {d[1:3] for d in texts.DENOISERS if d[0] == 'X'} == {
    (3, 0.5),
    (8, 0.5),
    (64, 0.15),
    (64, 0.5),
  }


def test_each_denoiser_comes_as_often_as_asked_with_its_mode_and_density():
  task = make_task(
    [('R', 4.0, 0.1, 3.0), ('S', 0.0, 0.3, 2.0), ('X', 4.0, 0.5, 1.0)]
  )
  generator = np.random.default_rng(0)
  window = np.full(task.window, 5)
  shares = collections.defaultdict(list)
  for _ in range(1200):
    example = task(window, generator)
    num_learned = (example.targets == 5).mean() * len(example.targets)
    shares[int(example.inputs[0])].append(num_learned / len(window))
  counts = {mode: len(share) for mode, share in shares.items()}
  assert abs(counts[MODES['R']] - 600) < 60
  assert abs(counts[MODES['S']] - 400) < 60
  assert abs(counts[MODES['X']] - 200) < 60
  for mode, density in (('R', 0.1), ('S', 0.3), ('X', 0.5)):
    assert abs(np.mean(shares[MODES[mode]]) - density) < 0.02
  # The length of a suffix is random, the share of noise of the other denoisers
  # is not.
  assert np.std(shares[MODES['S']]) > 0.1
  assert np.std(shares[MODES['R']]) < 1e-9


def test_s_is_a_prefix_and_its_text_in_order():
  task = make_task([('R', 3.0, 0.15, 0.0), ('S', 0.0, 0.25, 1.0)])
  inputs, targets = task(np.arange(10, 40), np.random.default_rng(1))
  assert inputs[0] == MODES['S'] and inputs[-1] == EOS
  assert [*inputs[1:-1], *targets] == list(range(10, 40))
  # In a row of a decoder-only model no end of text stands between prefix and
  # suffix.
  task = make_task([('S', 0.0, 0.25, 1.0)], RowShape(50))
  inputs, targets = task(np.arange(10, 40), np.random.default_rng(1))
  assert [*inputs[1:], *targets] == list(range(10, 40))


@pytest.mark.parametrize('shape', [RowShape(40, 30), RowShape(50)])
def test_no_window_overflows_whatever_is_drawn(shape):
  task = make_task(shape=shape)
  generator = np.random.default_rng(2)
  for n in range(2, task.window + 1):
    bounds = task.lengths(np.array([n]))
    assert task.layout.fits(bounds).all()
    for _ in range(8):
      example = task(np.arange(n), generator)
      assert len(example.inputs) <= bounds.inputs[0]
      assert len(example.targets) <= bounds.targets[0]
      assert len(example.inputs) + len(example.targets) <= bounds.total[0]


@pytest.mark.parametrize(
  ('denoisers', 'message'),
  [
    ((), 'none of positive weight'),
    ((('R', 3.0, 0.15, 0.0),), 'none of positive weight'),
    ((('T', 3.0, 0.15, 1.0),), r"'T'; have \['R', 'S', 'X'\]"),
    ((('R', 3.0, 0.15, -1.0),), 'weight=-1.0 must be at least 0'),
    ((('R', 3.0, 1.0, 1.0),), r'density=1.0 not in \(0, 1\)'),
    ((('R', 0.0, 0.5, 1.0),), 'mean span=0.0 must be at least 1'),
  ],
)
def test_wrong_mixtures_are_refused(denoisers, message):
  with pytest.raises(ValueError, match=message):
    texts.Ul2Task(denoisers=denoisers)
