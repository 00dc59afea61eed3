"""Teachers, and other models that are read, that do not fit the data."""

import pytest

from moe_jax import finetuning
from moe_jax.compression import calibration, distill, teacher_logits, whole_run
from moe_jax.finetuning import choose_experts
from tests.compression.test_distill import config_of
from tests.finetuning.test_start import config_from, set_up
from tests.generation import folders
from tests.training.tiny import MODULES

BY_TASK = {
  'moe': {
    'num_experts': 4,
    'router': {'kind': 'task'},
    'capacity': {'kind': 'all'},
  }
}


def mixture(*names):
  """Overrides of data with a task of each name."""
  source = {'kind': 'python_stdlib', 'modules': MODULES}
  return {
    'source': {'python_stdlib': {'modules': ''}},
    'mixture': {'sources': dict.fromkeys(names, source)},
  }


@pytest.fixture(scope='module')
def by_task(tmp_path_factory):
  """The folder of a run that routes by the tasks de and fr, in this order."""
  folder = tmp_path_factory.mktemp('by_task')
  folders.write(folder, model=BY_TASK, data=mixture('de', 'fr'))
  return folder


def test_a_task_must_have_the_same_number_in_both_runs(by_task, tmp_path):
  # Task 0 of this data is fr, which the other run knows as task 1.
  data = mixture('fr')
  taught = set_up(config_of(by_task, data=data), tmp_path / 'a')
  tuned = set_up(config_from(by_task, BY_TASK, data=data), tmp_path / 'a')
  options = taught.options.data
  message = r"by the tasks \['de', 'fr'\], and the data has \['fr'\]"
  numbers = dict(seed=0, batch_size=4, batches=1, top=1)
  for call in (
    lambda: distill.Distilling().initial(taught),
    lambda: finetuning.initial(tuned),
    lambda: calibration.batches(whole_run.read(by_task), 1, options),
    lambda: choose_experts.choose(by_task, share=0.5, options=options),
    lambda: teacher_logits.write(by_task, tmp_path / 'c', options, **numbers),
  ):
    with pytest.raises(ValueError, match=message):
      call()
