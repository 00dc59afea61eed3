"""Unstable runs are told, sizes of logits, and choices that rounding flips."""

import numpy as np

from experiments import stmoe_tables2_4 as stability
from experiments.study import router_logits


def falling(steps: int = 200) -> np.ndarray:
  """Losses that fall from 5 to 1 with noise, as those of a healthy run."""
  noise = 0.05 * np.random.default_rng(0).normal(size=steps)
  return np.linspace(5, 1, steps) + noise


def test_a_run_that_recovers_is_stable():
  losses = falling()
  assert stability.is_stable(losses.tolist())
  assert not stability.is_stable(losses.tolist(), skipped=1)
  losses[120] += 2
  assert stability.is_stable(losses.tolist())  # the run has recovered
  losses[150:] = 4  # it ends above where it was
  assert not stability.is_stable(losses.tolist())


def test_rounding_flips_what_is_closer_than_a_bfloat16():
  # Numbers from 128 to 256 are rounded to whole ones, half to even: 128.5 to
  # 128, which is then as large as the first and comes second.
  logits = np.array([[128.0, 128.5], [2.0, 2.5], [128.0, 129.0]], np.float32)
  np.testing.assert_allclose(router_logits.rounded_choices(logits), 1 / 3)


def test_a_shift_of_all_logits_moves_the_log_sum_exp_alone():
  # Sums of exponentials are 4 and 4 e^2, and logits lie log(3) / 2 on either
  # side of their mean.
  logits = np.log(np.array([[1.0, 3.0], [3.0, 1.0]])) + np.array([[0.0], [2.0]])
  sizes = router_logits.sizes(logits)
  squares = np.log(4) ** 2, (2 + np.log(4)) ** 2
  np.testing.assert_allclose(sizes['squared_lse'], np.mean(squares))
  np.testing.assert_allclose(sizes['centred'], np.log(3) / 2)
