"""The commands merge and prune, on trained runs and on imported checkpoints."""

import shlex

import numpy as np
import pytest

from moe_jax import cli, run_config
from moe_jax.compression import __main__ as command
from moe_jax.compression import whole_run
from moe_jax.interop import verifying
from moe_jax.interop.export_run import export_run
from moe_jax.layers.retained import Retained
from tests.generation import folders as run_folders
from tests.interop import folders, oracle

COMMANDS = {
  'merged': ['merge', '--experts=3', '--group_by=weights', '--grouping=cores'],
  'pruned': ['prune', '--experts=3', '--score=gate'],
}


def run(capsys, *argv):
  command.main(list(argv))
  return capsys.readouterr().out


def imported(folder, kind, **sizes):
  folders.write(folder / kind, kind, **sizes)
  folders.import_run(folder / kind, folder / 'run')
  return folder / 'run'


@pytest.fixture(scope='module')
def mixtral(tmp_path_factory):
  folder = tmp_path_factory.mktemp('runs')
  return imported(folder, 'mixtral', num_hidden_layers=2)


def check_logits(new_run, hf_model):
  inputs = oracle.inputs(hf_model.eval())
  expected = oracle.logits(hf_model, inputs)
  logits, is_real = verifying.logits(
    new_run.model, new_run.variables, inputs, None
  )
  np.testing.assert_allclose(logits[is_real], expected[is_real], atol=1e-4)


@pytest.mark.parametrize('name', COMMANDS)
@pytest.mark.slow
def test_a_smaller_mixtral_loads_in_transformers(
  name, mixtral, tmp_path, capsys
):
  verb, *flags = COMMANDS[name]
  new = tmp_path / 'new'
  source = [f'--run={mixtral}', f'--output={new}', '--batches=1']
  output = run(capsys, verb, *source, *flags)
  new_run, old_run = whole_run.read(new), whole_run.read(mixtral)
  before, after = (
    whole_run.bytes_in_memory(r.variables) for r in (old_run, new_run)
  )
  assert f'{before:,} before, {after:,} now' in output
  expert = 4 * 3 * 24 * 20
  assert before - after == 2 * 2 * (expert + 4 * 24 * (name != 'merged'))
  lines = export_run(new, tmp_path / 'hf')
  assert any('do not fall' in line for line in lines) == (name == 'merged')
  hf_model = oracle.CLASSES['mixtral'].from_pretrained(tmp_path / 'hf')
  assert hf_model.config.num_local_experts == (5 if name == 'merged' else 3)
  check_logits(new_run, hf_model)


@pytest.mark.slow
def test_uneven_models_are_runs_that_transformers_lacks(
  mixtral, tmp_path, capsys
):
  args = ['prune', f'--run={mixtral}', '--batches=1']
  uneven, share = tmp_path / 'uneven', tmp_path / 'share'
  run(capsys, *args, '--experts=2,4', f'--output={uneven}')
  moe = whole_run.read(uneven).options.model.moe
  assert (moe.num_experts, moe.retained) == (4, Retained('0:2'))
  with pytest.raises(ValueError, match=r'\[2, 4\] experts, where transformers'):
    export_run(uneven, tmp_path / 'hf')
  run(capsys, *args, '--share=0.6', f'--output={share}')
  moes = whole_run.read(share).model.stacks.moes
  assert sum(moe.num_experts for moe in moes) == 6


@pytest.mark.slow
def test_a_smaller_switch_loads_in_transformers(tmp_path, capsys):
  sizes = dict(num_layers=2, num_sparse_encoder_layers=1)
  switch = imported(tmp_path, 'switch_transformers', **sizes)
  new = tmp_path / 'new'
  source = [f'--run={switch}', f'--output={new}', '--batches=1']
  run(capsys, *COMMANDS['pruned'], *source)
  export_run(new, tmp_path / 'hf')
  kind = oracle.CLASSES['switch_transformers']
  check_logits(whole_run.read(new), kind.from_pretrained(tmp_path / 'hf'))


def test_a_trained_run_is_merged_on_other_data(tmp_path, capsys):
  old, new = tmp_path / 'run', tmp_path / 'new'
  run_folders.write(old, model={'moe': {'num_experts': 4}})
  path = folders.write_config(tmp_path)
  flags = [f'--run={old}', f'--output={new}', '--share=0.5', '--batches=2']
  flags += [f'--config={path}', '--config.data.seq_len=16']
  output = run(capsys, 'merge', *flags)
  model = whole_run.read(new).options.model
  assert model.moe.num_experts == 4 and list(model.moe.retained.rows) == [1]
  # The last line is the command that recovers what was lost.
  words = shlex.split(output.splitlines()[-1])
  assert words[:3] == ['python', '-m', 'moe_jax.main']
  config_flag, workdir_flag, *overrides = words[3:]
  assert workdir_flag == f'--workdir={new}-recovered'
  assert f'--config.distill.teacher={old}' in overrides
  config = cli.config_of(config_flag.removeprefix('--config='), overrides)
  options = run_config.read(config)
  assert options.distill.start == 'none'
  assert options.init_from.workdir == str(new)
  assert options.model.moe == model.moe
