"""The command line: its files, and its messages about mistakes."""

import os
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

import moe_jax.main
from moe_jax import cli, run_config
from moe_jax.config import flatten, section_of
from moe_jax.errors import InputError
from tests import programs


def command(workdir, *flags, config='configs/tiny_switch.py:runlocal'):
  """The words of a training after `python -m moe_jax.main`."""
  return [f'--config={config}', f'--workdir={workdir}', *flags]


TINY = 'moe_jax:tiny_switch'


def run_main(argv, capsys):
  """The exit status of the command in this process, and what it printed."""
  status = 0
  try:
    moe_jax.main.main(argv)
  except SystemExit as exit_error:
    status = exit_error.code
  return status, capsys.readouterr()


def test_all_that_is_wrong_is_said_at_once(capsys):
  flags = (
    *('--config.model.moe.num_expert=3', '--config.total_step', '3'),
    *('--config.seed', '3', '--config.total_steps=-1', '--config.data.pack=x'),
  )
  argv = command('w', *flags, config=TINY)
  status, output = run_main(argv, capsys)
  lines = output.err.splitlines()
  assert (status, len(lines)) == (1, 4)
  assert "did you mean 'model.moe.num_experts'? --describe" in lines[0]
  assert "did you mean 'total_steps'? --describe" in lines[1]
  assert "'x' is no boolean; give the flag alone" in lines[2]
  assert lines[3] == 'total_steps=-1 must be at least 1'


@pytest.mark.parametrize(
  ('more', 'error'), [((), SystemExit), (('--traceback',), ValueError)]
)
def test_an_error_is_a_line_or_on_request_a_trace(
  more, error, tmp_path, capsys
):
  with pytest.raises(error) as exit_error:
    moe_jax.main.main(command(tmp_path, *more))
  message = f'{exit_error.value}{capsys.readouterr().err}'
  assert 'multiply to 1, which does not fit 8 devices' in message


def test_an_error_of_a_library_keeps_its_traceback():
  with pytest.raises(ValueError, match='literal'), cli.reported():
    int('x')


def test_a_platform_that_is_not_there_is_a_line():
  code = (
    'import jax; from moe_jax import cli\nwith cli.reported(): jax.devices()'
  )
  env = {'JAX_PLATFORMS': 'cuda', 'CUDA_VISIBLE_DEVICES': ''}
  process = programs.run('-c', code, env=env)
  assert process.returncode == 1
  (line,) = process.stderr.splitlines()
  assert line.startswith('moe_jax: ') and 'JAX_PLATFORMS' in line


@pytest.mark.parametrize(
  ('error', 'status'),
  [(KeyboardInterrupt(), cli.INTERRUPTED), (InputError('wrong'), 1)],
)
def test_a_message_that_nobody_reads_keeps_the_status(
  error, status, closed_pipe, monkeypatch
):
  monkeypatch.setattr(sys, 'stderr', closed_pipe)
  with pytest.raises(SystemExit) as exit_error, cli.reported():
    raise error
  assert exit_error.value.code == status
  closed_pipe.flush()  # as the interpreter does at its end


def test_every_key_is_described_without_a_workdir(capsys):
  config = '--config=configs/tiny_switch.py'
  status, output = run_main([config, '--describe'], capsys)
  assert (status, output.err) == (0, '')
  assert '*  batch_size = 16  (default: 32)' in output.out
  # Options of the chosen kind come before those of other kinds.
  chosen = output.out.index(' model.moe.router.token_choice.')
  assert chosen < output.out.index(' model.moe.router.noisy_top_k.')
  for path in flatten(cli.load_config(config[9:])):
    path = path.partition('overrides.')[0].removesuffix('_')
    assert f' {path}' in output.out, path


def test_flags_may_add_what_open_sections_hold():
  schedule = '--config.optimizer.schedule'
  flags = [
    f'{schedule}.kind=tests.own_kinds:Steps',
    f'{schedule}.custom.every=3',
  ]
  options, _ = run_config.options_of(TINY, flags)
  assert options.optimizer.schedule.every == 3
  with pytest.raises(ValueError, match=r'mean .evals\.all_tokens\.num_batches'):
    run_config.options_of(TINY, ['--config.evals.all_tokens.num_batch=3'])


def test_a_flag_gives_a_new_section_whole():
  flags = [
    "--config.evals.mine={'kind': 'choice', 'num_shots': 2}",
    "--config.evals.train_capacity.model_overrides.ffn={'activation': 'relu'}",
  ]
  options, _ = run_config.options_of(TINY, flags)
  assert options.evals['mine'].num_shots == 2
  overrides = options.evals['train_capacity'].model_overrides
  assert overrides == {'ffn': {'activation': 'relu'}}


LONGER = (
  '--config.total_steps=60',
  '--config.checkpoint.every_steps=7',
  '--config.model.dropout=0.1',
  '--config.sample.num_tokens=0',
)


def final_arrays(workdir):
  step = max(int(p.name) for p in (workdir / 'checkpoints').glob('[0-9]*'))
  folder = (workdir / 'checkpoints' / str(step)).resolve()
  with ocp.PyTreeCheckpointer() as checkpointer:
    tree = checkpointer.metadata(folder).item_metadata.tree
    numpy = ocp.RestoreArgs(restore_type=np.ndarray)
    restored = checkpointer.restore(
      folder, restore_args=jax.tree.map(lambda _: numpy, tree)
    )
  return step, ocp.tree.to_flat_dict(restored)


# A period of rows that no checkpoint falls on, and no time lost on scores.
MIXED = (
  *('--config.model.num_layers=1', '--config.model.moe.layers=all'),
  '--config.data.mixture.period=50',
  '--config.evals.losses.every_steps=0',
  '--config.evals.scores.every_steps=0',
  '--config.evals.scores.num_tokens=0',
)


@pytest.mark.as_users_compile
@pytest.mark.slow
def test_stopped_and_killed_ends_as_unbroken(tmp_path):
  # A mixture, whose order of sources has to go on where it was.
  config = 'configs/instruct.py:runlocal'
  whole, broken = (
    ['-m', 'moe_jax.main', *command(folder, *LONGER, *MIXED, config=config)]
    for folder in (tmp_path / 'whole', tmp_path / 'broken')
  )
  unbroken = programs.run(*whole)
  assert unbroken.returncode == 0, unbroken.stderr
  rng = random.Random(0)
  killed = stopped = 0
  for _ in range(3):
    process = programs.started(*broken, stderr=subprocess.DEVNULL)
    # Each process is killed only after some lines, so that all make progress.
    num_steps = 0
    patience = rng.randint(2, 25)
    for line in process.stdout:
      num_steps += line.startswith('step ')
      if killed < 2 and num_steps > patience:
        time.sleep(rng.random() * 0.1)
        # The first process, which is far from the end, gets SIGTERM, and later
        # ones SIGKILL.
        number = signal.SIGKILL if killed else signal.SIGTERM
        os.kill(process.pid, number)
        killed += 1
        break
    process.stdout.read()
    status = process.wait()
    assert status in (0, cli.STOPPED, -signal.SIGKILL)
    stopped += status == cli.STOPPED
    if status == 0:
      break
  assert (killed, stopped) == (2, 1)
  step, expected = final_arrays(tmp_path / 'whole')
  other_step, arrays = final_arrays(tmp_path / 'broken')
  assert step == other_step == 60
  assert expected.keys() == arrays.keys()
  for key, value in expected.items():
    np.testing.assert_array_equal(arrays[key], value, err_msg=str(key))


# A long run that compiles soon.
DENSE = (
  '--config.total_steps=4000',
  *('--config.model.num_layers=1', '--config.model.moe.layers=all'),
  '--config.model.moe.num_experts=0',
)


@pytest.fixture(scope='module')
def interrupted(tmp_path_factory):
  """The folder of a run that Ctrl-C ended, its exit status, and its errors."""
  folder = tmp_path_factory.mktemp('interrupted')
  # The terminal sends the signal to `tee` of `| tee log`, too.
  process = programs.started(
    *('-m', 'moe_jax.main', *command(folder, *DENSE)),
    # A check that runs in the background has Ctrl-C ignored.
    preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
  )
  next(line for line in process.stdout if line.startswith('step 3'))
  process.stdout.close()
  process.send_signal(signal.SIGINT)
  _, errors = process.communicate(timeout=120)
  return folder, process.returncode, errors


@pytest.mark.slow
def test_ctrl_c_saves_though_the_reader_of_the_pipe_is_gone(interrupted):
  folder, status, errors = interrupted
  assert status == cli.INTERRUPTED, errors
  # Libraries may add lines of their own.
  ours = [line for line in errors.splitlines() if line.startswith('moe_jax: ')]
  first, last = ours
  assert 'another Ctrl-C stops at once' in first
  step, _ = final_arrays(folder)
  assert f'interrupted at step {step} and saved: the same command' in last


@pytest.mark.slow
def test_a_full_disk_is_a_line_and_the_run_before_it_intact(interrupted):
  folder, _, _ = interrupted
  step, arrays = final_arrays(folder)
  script = (
    'import resource, runpy, signal, sys;'
    'signal.signal(signal.SIGXFSZ, signal.SIG_IGN);'
    'resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000));'
    "sys.argv[0] = 'moe_jax.main';"
    "runpy.run_module('moe_jax.main', run_name='__main__')"
  )
  flags = ('--resume', *DENSE, '--config.checkpoint.every_steps=1')
  # The cache of compiled programs would report the full disk, too.
  env = {'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '999'}
  process = programs.run('-c', script, *command(folder, *flags), env=env)
  assert process.returncode == 1
  assert len(process.stderr.strip().splitlines()) <= 4, process.stderr
  assert 'File too large' in process.stderr
  other_step, others = final_arrays(folder)
  assert other_step == step
  for key, value in arrays.items():
    np.testing.assert_array_equal(others[key], value)


@pytest.mark.parametrize(
  ('config', 'flag', 'ignored'),
  [
    # The kinds of the model and of the schedule have no common options.
    ('tiny_switch', 'model.kind=lstm', 'model.'),
    ('tiny_switch', 'optimizer.schedule.kind=constant', ''),
    ('deepseek_v3', 'model.moe.router.kind=noisy_top_k', 'model.moe.router.'),
    # What other options are for is switched off.
    (
      'kudugunta_multilingual',
      'data.mixture.rule=proportional',
      'data.mixture.temperature',
    ),
    # An encoder has options of the decoder's router in its overrides.
    (
      'nllb_moe_54b',
      'model.moe.router.kind=random',
      'model.encoder.overrides.moe.router.token_choice.slot_priority=',
    ),
  ],
)
def test_a_flag_may_choose_another_kind_than_the_file(config, flag, ignored):
  spec = f'configs/{config}.py'
  options, lines = run_config.options_of(spec, [f'--config.{flag}'])
  assert ignored in '\n'.join(lines)
  # The result equals the options of its config: nothing is lost.
  assert run_config.read(section_of(options)) == options


def test_options_in_vain_are_refused_where_a_flag_sets_them():
  prefix = 'model.encoder.overrides.moe.router'
  flags = [
    '--config.model.moe.router.kind=random',
    f'--config.{prefix}.token_choice.slot_priority=batch_priority',
  ]
  with pytest.raises(ValueError, match=r'slot_priority=.* no effect with moe'):
    run_config.options_of('configs/nllb_moe_54b.py', flags)


def test_a_dry_run_prints_what_flags_leave_without_effect(capsys):
  # The file sets jitter of the router of tokens' choices.
  argv = [
    '--config=configs/tiny_switch.py:runlocal',
    '--config.model.moe.router.kind=random',
    *('--config.mesh.data=-1', '--config.batch_size=32', '--dry_run'),
  ]
  status, output = run_main(argv, capsys)
  assert status == 0, output.err
  name = 'model.moe.router.token_choice.jitter'
  assert f'{name}=0.01 has no effect with these flags; ignored' in output.out


def test_flags_may_stand_apart_from_values():
  words = ['--config.seed', '3', '--config.init_from.step', '-1', '--describe']
  words += ['--config.sample.prompt=a b', '--config.data.pack']
  flags, overrides = moe_jax.main.parse(['--config=x', *words])
  assert flags.describe == ''
  assert overrides == [
    '--config.seed=3', '--config.init_from.step=-1',
    '--config.sample.prompt=a b', '--config.data.pack',
  ]  # fmt: skip
