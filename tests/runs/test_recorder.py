"""Rows of metrics from the metrics of steps, without a run."""

import jax
import numpy as np

from moe_jax.data import DataOptions, SpanCorruptionTask
from moe_jax.routing import empty_aux
from moe_jax.runs import metrics
from moe_jax.runs.recorder import Recorder
from moe_jax.runs.summary import LossSums, StepMetrics


def test_tokens_of_both_halves_of_a_row_count_for_the_speed(tmp_path):
  # Eight inputs and three targets, in each of five rows.
  data = DataOptions(task=SpanCorruptionTask(), seq_len=8, target_len=3)
  recorder = Recorder(
    tmp_path,
    total_steps=3,
    log_every_steps=1,
    max_nonfinite_steps=0,
    batch_tokens=5 * data.row_tokens,
    moes=(),
    state=None,
    checkpoints=None,
    tell=str,
  )
  aux = jax.tree.map(lambda leaf: np.zeros((1, *leaf.shape)), empty_aux(1, 1))
  step = StepMetrics(
    *(np.float32(1), LossSums(*np.ones(3), aux), np.float32(1), np.float32(1)),
    np.array([True]),
  )
  with recorder.recording(0):
    for number in (1, 2, 3):
      recorder.add(number, step, {})
  rows = metrics.read_metrics(tmp_path / metrics.FILE_NAME)
  speeds = [row for row in rows if 'train/step_seconds' in row]
  assert [row['step'] for row in speeds] == [2]
  for row in speeds:
    tokens = row['train/tokens_per_second'] * row['train/step_seconds']
    np.testing.assert_allclose(tokens, 5 * (8 + 3), rtol=1e-6)
