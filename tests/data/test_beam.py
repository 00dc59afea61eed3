"""Apache Beam makes the same bytes as a pool, and goes on after a kill."""

import site
import subprocess
import time
import venv

import pytest

from tests.data.test_prepare import (
  command,
  digests_of,
  large,  # noqa: F401 - a fixture
  output_of,
  whole_pieces,
)


@pytest.fixture(scope='module')
def python(tmp_path_factory):
  """The Python of an environment that has Beam, and all that is here.

  Beam's versions of other packages stay out of the environment of the tests.
  """
  folder = tmp_path_factory.mktemp('beam')
  venv.create(folder, with_pip=True)
  (packages,) = folder.glob('lib/python*/site-packages')
  (packages / 'here.pth').write_text('\n'.join(site.getsitepackages()))
  python = folder / 'bin' / 'python'
  install = [python, '-m', 'pip', 'install', '--quiet', 'apache-beam>=2.65']
  subprocess.run(install, check=True)
  return str(python)


@pytest.mark.slow
def test_100_mb_by_beam_are_those_of_the_pool(python, large, tmp_path):  # noqa: F811
  one, two = tmp_path / 'one', tmp_path / 'two'
  pool = command(large, one, '--processes=1')
  beam = '--runner=FnApiRunner', '--', '--direct_num_workers=1'
  killed = command(large, two, *beam, python=python)
  while len(whole_pieces(two)) < 2:
    assert killed.poll() is None, killed.communicate()
    time.sleep(0.05)
  killed.kill()
  killed.communicate()
  output_of(command(large, two, *beam, python=python))
  output_of(pool)
  assert digests_of(one) == digests_of(two)
