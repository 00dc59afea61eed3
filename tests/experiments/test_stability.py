"""Spikes, rises and diverged runs are told, and choices that rounding flips."""

import numpy as np

from experiments import stmoe_tables2_4 as stability
from experiments.study import router_logits


def falling(steps: int = 200) -> np.ndarray:
  """Losses that fall from 5 to 1 with noise, as those of a healthy run."""
  noise = 0.05 * np.random.default_rng(0).normal(size=steps)
  return np.linspace(5, 1, steps) + noise


def test_a_healthy_run_is_stable_and_has_no_spikes():
  losses = falling().tolist()
  assert stability.is_stable(losses)
  assert stability.spikes(losses) == 0
  assert stability.largest_rise(losses) < 0.3


def test_a_jump_is_a_spike_and_a_rise():
  losses = falling()
  losses[120] += 2
  losses = losses.tolist()
  assert stability.spikes(losses) == 1
  lowest = min(losses[:120])
  np.testing.assert_allclose(
    stability.largest_rise(losses), losses[120] - lowest
  )
  assert stability.is_stable(losses)  # the run has recovered


def test_a_run_that_ends_above_where_it_was_is_not_stable():
  losses = falling()
  losses[150:] = 4
  assert not stability.is_stable(losses.tolist())
  assert not stability.is_stable(falling().tolist(), skipped=1)


def test_rounding_flips_what_is_closer_than_a_bfloat16():
  # Numbers from 128 to 256 are rounded to whole ones, half to even: 128.5 to
  # 128, which is then as large as the first and comes second.
  logits = np.array([[128.0, 128.5], [2.0, 2.5], [128.0, 129.0]], np.float32)
  np.testing.assert_allclose(router_logits.rounded_choices(logits), 1 / 3)
