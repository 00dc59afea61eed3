"""A run with adapters, from config to text; its adapter in its own folder."""

import shutil

import jax
import numpy as np
import pytest

from moe_jax import evaluation, generation
from moe_jax.config import merge
from moe_jax.data import tokenizers
from moe_jax.data.tokenizers import extra_ids
from moe_jax.finetuning import __main__ as command
from moe_jax.finetuning import adapters
from moe_jax.runs import metrics
from moe_jax.training import trained
from moe_jax.training.evaluate import LossEvaluation
from tests.finetuning.test_start import train
from tests.generation import folders
from tests.models.tiny import leaves
from tests.training import tiny
from tests.training.conftest import _equal_runs_share_programs  # noqa: F401

MODEL = dict(num_layers=1, moe=dict(layers='all'))
LORA = dict(rank=2, parts='experts')
LOSS = 'eval/train_capacity/loss'


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
  """A base, and a run with adapters that begins with it: their folders."""
  folder = tmp_path_factory.mktemp('adapters')
  folders.write(folder / 'base', steps=(1, 3), model=MODEL)
  train(config_of(folder / 'base'), folder / 'run')
  return folder


def config_of(base, **overrides):
  config = tiny.config(
    total_steps=2,
    model=MODEL,
    lora=LORA,
    sample=dict(num_tokens=0),
    optimizer=dict(learning_rate=0.1),
    **overrides,
  )
  return merge(config, dict(init_from=dict(workdir=str(base))))


def params_of(workdir, **kwargs):
  run = trained.read(workdir)
  model = run.model.build(run.sharding.rules)
  restored = trained.restore_variables(
    workdir, model, run.sharding.rules, **kwargs
  )
  return model, restored.state['params']


def assert_equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.slow
def test_the_run_is_loaded_with_merged_kernels(runs):
  merged, base = (
    leaves(generation.load(runs / name).variables['params'])
    for name in ('run', 'base')
  )
  assert merged.keys() == base.keys()
  moved = [name for name in base if (merged[name] != base[name]).any()]
  assert moved and all('experts' in name for name in moved)
  # Evaluations of the run are those of merged kernels, too.
  rows = metrics.read_metrics(runs / 'run' / metrics.FILE_NAME)
  (loss,) = (r[LOSS] for r in rows if LOSS in r)
  again = evaluation.evaluate(runs / 'run', LossEvaluation(num_batches=2))
  np.testing.assert_allclose(loss, again['loss'], rtol=1e-5)


@pytest.mark.slow
def test_a_run_goes_on_as_if_it_had_not_stopped(runs, tmp_path):
  config = config_of(runs / 'base')
  config = merge(config, dict(checkpoint=dict(every_steps=1)))
  unbroken = train(config, tmp_path / 'whole')
  folders.damage(tmp_path / 'whole', 2)
  resumed = train(config, tmp_path / 'whole')
  assert_equal(unbroken.params, resumed.params)


def test_an_adapter_is_kept_alone_and_merged_into_its_base(runs, tmp_path):
  adapter, merged = tmp_path / 'adapter', tmp_path / 'merged'
  flags = f'--workdir={runs / "run"}', f'--output={adapter}'
  command.main(['save', *flags, '--step=2'])
  files = sum(path.stat().st_size for path in adapter.iterdir())
  model, expected = params_of(runs / 'run')
  size = sum(x.nbytes for x in jax.tree.leaves(expected))
  assert files < size / 2
  flags = [f'--workdir={runs / "base"}', f'--output={merged}', '--step=3']
  command.main(['merge', f'--adapter={adapter}', *flags])
  assert_equal(params_of(merged)[1], expected)
  # Onto the base in memory, too; never onto another.
  _, base = params_of(runs / 'base')
  adapted, params = adapters.read(adapter, model, base)
  assert_equal(adapted.merged_on_devices(params), expected)
  for call in (
    lambda: adapters.read(adapter, model, expected),
    lambda: adapters.merge(adapter, runs / 'base', tmp_path / 'other', step=1),
  ):
    with pytest.raises(ValueError, match='adapter of the base with sha256'):
      call()
  with pytest.raises(ValueError, match=r'itself.*give the folder of its base'):
    adapters.merge(adapter, runs / 'run', tmp_path / 'other')


def test_a_merged_run_reads_inputs_as_the_adapters_run_did(runs, tmp_path):
  run, merged = tmp_path / 'run', tmp_path / 'merged'
  shutil.copytree(runs / 'run', run)
  # The task of the adapter's run ended inputs; the base's did not.
  ended = extra_ids.extend(tokenizers.Bytes(), end_inputs=True)
  ended.save(run / 'tokenizer.json')
  adapters.save(run, tmp_path / 'adapter')
  adapters.merge(tmp_path / 'adapter', runs / 'base', merged)
  for folder, ids in ((runs / 'base', [97]), (run, [97, 256])):
    assert trained.read(folder).tokenizer.encode_inputs('a').tolist() == ids
  assert trained.read(merged).tokenizer.identity == ended.identity
  # Another tokenizer is not that of the adapter.
  tokenizers.Bytes().save(tmp_path / 'adapter' / 'tokenizer.json')
  with pytest.raises(ValueError, match='is damaged'):
    adapters.merge(tmp_path / 'adapter', runs / 'base', tmp_path / 'other')


def test_a_damaged_adapter_is_refused(runs, tmp_path):
  model, base = params_of(runs / 'base')
  adapters.save(runs / 'run', tmp_path / 'adapter')
  about, weights = (
    tmp_path / 'adapter' / name for name in (adapters.ABOUT, adapters.WEIGHTS)
  )
  content = weights.read_bytes()
  # An exponent's bit, and the scale of the products.
  weights.write_bytes(content[:-1] + bytes([content[-1] ^ 0x40]))
  with pytest.raises(ValueError, match='is damaged'):
    adapters.read(tmp_path / 'adapter', model, base)
  weights.write_bytes(content)
  about.write_text(about.read_text().replace('"alpha": 1', '"alpha": 9'))
  with pytest.raises(ValueError, match='is damaged'):
    adapters.read(tmp_path / 'adapter', model, base)
