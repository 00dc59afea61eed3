"""The tests that one worker of pytest-xdist runs in a row: those of a file."""

from xdist.scheduler import LoadFileScheduling

# Each case of these long tests is a unit of its own: one worker would still run
# them when the others have no more tests.
SPREAD = (
  'test_a_study_keeps_its_contract',
  'test_every_way_to_make_a_run_runs',
  'test_notebook_runs',
  'test_on_eight_devices_the_experts_are_split_over_all',
)


def unit_of(nodeid: str) -> str:
  """The name of the unit that a test belongs to."""
  file, _, test = nodeid.partition('::')
  return nodeid if test.partition('[')[0] in SPREAD else file


class Units(LoadFileScheduling):
  """Distributes files, and the cases of some tests one by one."""

  def _split_scope(self, nodeid: str) -> str:
    return unit_of(nodeid)
