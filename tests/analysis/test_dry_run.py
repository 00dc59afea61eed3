"""The option `--dry_run` describes a run and leaves no trace."""

import dataclasses
import os
import time
import types

import jax
import numpy as np
import pytest

from moe_jax import data, devices
from moe_jax.analysis import cost, sharded
from moe_jax.analysis.dry_run import DryRun
from moe_jax.compression.distill import Distilling
from moe_jax.config import section_of
from moe_jax.data import cache_folders, tokenizers
from moe_jax.data.sources import files
from moe_jax.runs import workdir
from moe_jax.training.programs import make_programs
from moe_jax.training.setup import with_tokenizer
from tests.generation import folders
from tests.training import tiny

OPTIONS = tiny.options(
  total_steps=7, optimizer={'schedule': {'warmup_steps': 9}}
)


@pytest.fixture(autouse=True)
def _one_device_and_data(monkeypatch):
  monkeypatch.setattr(jax, 'devices', lambda: jax.local_devices()[:1])
  data.load(OPTIONS.data)  # a dry run says less of data that is not prepared


def report(options, folder, **kwargs):
  trial = DryRun(options, str(folder), **kwargs)
  return '\n'.join(trial.lines()), trial.problems


def test_a_run_that_could_begin(tmp_path):
  text, problems = report(OPTIONS, tmp_path / 'run')
  assert not problems
  assert not any(tmp_path.iterdir())
  for words in (
    'warm-up: 3 steps, half of total_steps=7',
    'run: 7 steps of 96 tokens, 672 in all, with',
    # They are of steps 2, 4, 6 and 7; the best, two others and a new one need
    # room.
    'room for 4, as one is written while 3 are there',
    "evaluation train_capacity: 'loss' every 3 steps and at the end, 3 in all",
    'run is new',
  ):
    assert words in text, words


def test_data_that_is_not_prepared_stays_so(tmp_path):
  cached = dict(cache_dir=str(tmp_path))
  data_options = dataclasses.replace(
    OPTIONS.data,
    source=data.PythonStdlibSource(),
    mixture=data.MixtureOptions(sources={'a': OPTIONS.data.source}),
    **cached,
  )
  mixture = dataclasses.replace(OPTIONS, data=data_options)
  text, problems = report(mixture, '')
  assert not problems
  assert 'data: not prepared yet; a run first reads all texts' in text
  assert 'parameters:' in text  # bytes have a known vocabulary
  assert 'workdir: none is given' in text
  chars = tiny.options(data={'tokenizer': {'kind': 'chars'}, **cached})
  assert 'depends on the vocabulary' in report(chars, '')[0]
  assert not any(tmp_path.iterdir())


def test_large_files_are_not_tokenized(tmp_path, monkeypatch):
  monkeypatch.setattr(files, 'PIECE_BYTES', 2**8)
  lines = '\n'.join(f'{{"text": "{i} {i}"}}' for i in range(99))
  for name in 'ab':
    path = tmp_path / f'{name}.jsonl'
    path.write_text(lines)
    os.utime(path, (0, 0))
  now = time.time_ns  # files at rest have their digests kept
  monkeypatch.setattr(cache_folders.time, 'time_ns', lambda: now() + 10**10)
  source = {'kind': 'files', 'files': {'pattern': f'{tmp_path}/*'}}
  chars = {'cache_dir': f'{tmp_path}/cache', 'tokenizer': {'kind': 'chars'}}
  options = tiny.options(data={'source': source, **chars})
  text, problems = report(options, '')
  assert not problems
  assert 'data: not prepared yet' in text
  assert not (tmp_path / 'cache').exists()


@pytest.mark.slow
def test_another_run_that_it_begins_with(tmp_path):
  other = tmp_path / 'other'
  folders.write(other, tokenizer=tokenizers.Chars('abc \n'))
  overrides = {
    'init_from': {'workdir': str(other)},
    'sample': {'prompt': 'ab'},
    'data': {'cache_dir': str(tmp_path / 'cache')},
  }
  # Its tokenizer is kept although the data is not prepared.
  text, problems = report(tiny.options(**overrides), '', hooks=[Distilling()])
  assert not problems
  assert f"that of {other}; data.tokenizer.kind='bytes' is not used" in text
  data_overrides = {
    **overrides['data'],
    'source': {'kind': 'files', 'files': {'pattern': f'{tmp_path}/*.txt'}},
  }
  for name in 'xy':
    (tmp_path / f'{name}.txt').write_text('a cab\n' * 40)
  # The hooks check a run whose data is prepared.
  options = tiny.options(**{**overrides, 'data': data_overrides})
  data.load(options.data)
  data.load(with_tokenizer(options, section_of(options), other)[0].data)
  for changes, problem in (
    ({}, ''),
    ({'model': {'width': 24}}, f'init_from.workdir={other}: '),
    ({'init_from': {'workdir': f'{tmp_path}/no'}}, 'holds no trained run'),
  ):
    options = tiny.options(**{**overrides, 'data': data_overrides, **changes})
    _, problems = report(options, '', hooks=[Distilling()])
    assert len(problems) == bool(problem), problems
    assert problem in ''.join(problems)


def test_a_folder_of_a_run(tmp_path):
  workdir.claim(tmp_path, section_of(OPTIONS))
  text, problems = report(OPTIONS, tmp_path)
  assert not problems
  assert 'a run without checkpoints: it begins anew' in text
  other = dataclasses.replace(OPTIONS, seed=3)
  text, (problem,) = report(other, tmp_path)
  assert 'a run whose config differs' in problem and 'seed: 0 -> 3' in problem
  text, problems = report(other, tmp_path, resume=True)
  assert not problems
  assert 'going on with another config: seed: 0 -> 3' in text
  names = {path.name for path in tmp_path.iterdir()}
  assert names == {workdir.CONFIG, workdir.CONFIG_SHA256, workdir.CONFIG_PY}
  folders.write(tmp_path / 'run', steps=(3,))
  shorter = tiny.options(total_steps=2)
  _, (problem,) = report(shorter, tmp_path / 'run', resume=True)
  assert 'has a checkpoint of step 3, and total_steps=2' in problem


def test_what_trains_and_what_it_begins_with_is_said(tmp_path):
  other = {'workdir': str(tmp_path / 'other')}
  cached = {'cache_dir': str(tmp_path / 'cache')}
  options = tiny.options(trainable='norms', init_from=other, data=cached)
  text, problems = report(options, tmp_path / 'run')
  assert "trainable='norms': " in text and ' parameters train (' in text
  assert [p for p in problems if 'other has no finished checkpoint' in p]


def test_a_mesh_that_does_not_fit_is_said(tmp_path):
  text, (problem,) = report(tiny.options(mesh={'data': 2}), tmp_path)
  assert 'does not fit 1 devices' in problem
  assert 'memory:' in text


@pytest.mark.skipif(not os.path.isdir('/proc'), reason='needs /proc')
def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
  (tmp_path / 'file').touch()
  for folder in ('/proc/run', tmp_path / 'file' / 'run'):
    _, (problem,) = report(OPTIONS, folder)
    assert problem.startswith(f'{folder} cannot be made or written')


def test_an_evaluation_that_does_not_fit_is_said(tmp_path, monkeypatch):
  wide = {'kind': 'all', 'all': {}}
  evals = {'train_capacity': {'model_overrides': {'moe': {'capacity': wide}}}}
  moe = {'num_experts': 64, 'dispatch': {'kind': 'einsum'}}
  options = tiny.options(evals=evals, model={'moe': moe})
  filled = options.filled(257)
  model, mesh = filled.build(), filled.mesh.make(jax.devices())
  programs = make_programs(filled, model, mesh)
  needs = cost.run_bytes(filled, model, programs, mesh)
  assert needs.step < needs.evaluation == needs.total
  monkeypatch.setattr(devices, 'host_bytes', lambda: needs.step)
  text, problems = report(options, tmp_path)
  assert not problems  # it is not certain
  assert ' in the largest evaluation, and it has' in text
  assert 'WARNING: that does not fit; a smaller batch_size' in text
  assert "model.remat='full'" in text
  options = tiny.options(evals=evals, model={'moe': moe, 'remat': 'full'})
  assert "model.remat='full'" not in report(options, tmp_path)[0]


def test_flops_and_bytes_by_formula():
  options = OPTIONS.filled(257)
  model = options.build()
  model_cost = cost.count(model, 24)
  # Seven steps of four rows; the backward pass is twice the forward pass.
  flops = cost.run_flops(options, model)
  assert flops == 3 * 7 * 4 * model_cost.example_flops
  mesh = options.mesh.make(jax.devices())
  programs = make_programs(options, model, mesh)
  needs = cost.run_bytes(options, model, programs, mesh)
  assert needs.parameters == needs.gradients == 4 * model_cost.total_params
  # Two moments of each parameter, and counts of steps.
  moments = needs.optimizer - 2 * needs.parameters
  assert 0 <= moments < 100
  seeds = needs.checkpoint - needs.parameters - needs.optimizer
  assert 0 <= seeds < 100


def test_adapters_need_what_the_compiled_step_needs():
  # Wide experts, so that what a batch leaves behind is small beside them.
  moe = {'layers': 'all', 'expert': {'hidden': 512}}
  options = tiny.options(
    model={'width': 64, 'num_layers': 4, 'moe': moe},
    lora={'rank': 2, 'parts': 'experts'},
  ).filled(257)
  model, mesh = options.build(), options.mesh.make(jax.devices())
  programs = make_programs(options, model, mesh)
  needs = cost.run_bytes(options, model, programs, mesh)
  # L=4, E=4, two kernels: their sums with the adapters, and their gradients.
  experts = 4 * 4 * 2 * 64 * 512 * 4
  assert needs.merged == experts
  assert needs.step - needs.activations > 3 * experts
  state, batch = programs.abstract_state, options.batch_shapes(model)
  step = programs.train_step.lower(state, batch).compile()
  needed_bytes = sharded.read(step, state).needed_bytes
  # XLA has parts of a layer twice, too; two copies of the experts are 43 %.
  assert needs.step == pytest.approx(needed_bytes, rel=0.1)


def test_the_least_time_of_a_step_is_that_at_the_vendors_peak():
  numerics = {'numerics': {'dtype': 'bfloat16'}}
  options = tiny.options(total_steps=7, model=numerics).filled(257)
  chip = types.SimpleNamespace(platform='tpu', device_kind='TPU v4')
  mesh = types.SimpleNamespace(devices=np.array([[chip], [chip], [chip]]))
  model = options.build()
  seconds = cost.least_step_seconds(options, model, mesh)
  flops = 3 * 4 * cost.count(model, 24).example_flops  # four rows
  assert seconds == pytest.approx(flops / (3 * 275e12))
  # Of a processor the vendor prints none.
  mesh = options.mesh.make(jax.devices())
  assert cost.least_step_seconds(options, model, mesh) == 0.0
