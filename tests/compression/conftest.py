"""The run that teaches in the tests of this folder."""

import pytest

from tests.compression.test_distill import TEACHER
from tests.generation import folders


@pytest.fixture(scope='session')
def teacher(tmp_path_factory):
  """The folder of a sparse run with a checkpoint of step 3."""
  folder = tmp_path_factory.mktemp('teacher')
  folders.write(folder, model=TEACHER)
  return folder
