"""The command line: the effect and the exit status of each command."""

import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest

from moe_jax import generation, interop
from moe_jax.interop import __main__ as cli
from tests.interop import folders, oracle

ROOT = pathlib.Path(__file__).parents[2]


def run(capsys, *argv):
  """Runs a command; returns (status, printed text, errors)."""
  with pytest.raises(SystemExit) as exit_info:
    cli.main([str(word) for word in argv])
  captured = capsys.readouterr()
  return exit_info.value.code, captured.out, captured.err


@pytest.mark.slow
def test_in_checked_and_out(tmp_path, capsys, monkeypatch):
  monkeypatch.chdir(ROOT)  # commands are run in this folder
  source, workdir, output = (tmp_path / name for name in ('hf', 'run', 'out'))
  folders.write(source, 'mixtral')
  options = ['--workdir', workdir, '--config', folders.write_config(tmp_path)]
  # The mesh has all of the tests' devices.
  options += ['--config.mesh.data=2', '--config.mesh.expert=1']
  options += ['--config.mesh.tensor=4', '--config.seed=3']
  status, text, _ = run(capsys, 'import', source, *options)
  assert status == 0 and 'on 8 x cpu' in text
  assert f'moe_jax.main --config={workdir}/this_config.py' in text
  status, _, error = run(capsys, 'import', source, *options)
  assert status == 1 and 'is there already' in error
  status, text, _ = run(
    capsys, 'export', '--workdir', workdir, '--output', output
  )
  assert status == 0 and f'step 0 written to {output}' in text
  # The exported checkpoint equals the imported one, in transformers and here.
  hf_model = oracle.CLASSES['mixtral'].from_pretrained(output)
  expected = oracle.write(hf_model.eval(), tmp_path / 'again')
  path = tmp_path / 'again' / 'expected.npz'
  status, text, _ = run(capsys, 'verify', output, '--expected', path)
  assert status == 0 and 'all 9 agree' in text
  expected['logits'][0, 0, 0] += 1
  expected['greedy'][0, -1] += 1
  np.savez(path, **expected)
  status, text, _ = run(capsys, 'verify', output, '--expected', path)
  assert status == 1 and ' > 1e-04' in text and 'differs at place 19' in text


@pytest.mark.slow
def test_an_import_that_is_killed_is_started_again(tmp_path):
  source, workdir = tmp_path / 'hf', tmp_path / 'run'
  folders.write(source, 'mixtral')
  options = ['--workdir', workdir, '--config', folders.write_config(tmp_path)]
  words = [str(word) for word in ('import', source, *options)]
  command = [sys.executable, '-m', 'moe_jax.interop', *words]
  unfinished = '.run.unfinished-*'
  with subprocess.Popen(command, cwd=ROOT) as process:
    while process.poll() is None:
      if [*tmp_path.glob(f'{unfinished}/run/checkpoints/0')]:
        process.kill()
      time.sleep(0.0005)
  if process.returncode != 0:
    assert not workdir.exists()
    subprocess.run(command, cwd=ROOT, check=True)
  assert not [*tmp_path.glob(unfinished)]
  loaded, expected = generation.load(workdir), interop.load(source)
  folders.assert_equal(loaded.variables, expected.variables)
