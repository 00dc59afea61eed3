"""The folder of a run, and checkpoints that are kept elsewhere."""

import dataclasses

import jax
import numpy as np
import pytest

from moe_jax import run_config
from moe_jax.config import merge, section_of
from moe_jax.runs import workdir
from moe_jax.training import loop, trained
from tests.training import tiny


def test_a_bucket_is_no_workdir():
  config = tiny.config()
  with pytest.raises(ValueError, match=r'gs://b/run.*checkpoint\.directory'):
    workdir.check('gs://b/run', config)


@pytest.mark.slow
def test_checkpoints_in_a_folder_of_their_own(tmp_path):
  folder, elsewhere = tmp_path / 'run', tmp_path / 'bucket' / 'run'
  config = tiny.config(
    total_steps=2,
    model={'moe': {'num_experts': 0}},
    checkpoint={'keep_best': False, 'directory': str(elsewhere)},
  )
  config.evals = {}
  options, cpu = run_config.read(config), jax.devices()[:1]
  state = loop.train_and_evaluate(options, folder, devices=cpu)
  assert not (folder / workdir.CHECKPOINTS).exists()
  assert (elsewhere / '2').is_dir()
  # Readers of a run find its checkpoints from its folder alone.
  run = trained.read(folder)
  assert run.model == options.filled(257).model
  tokenizer_id = run.data.tokenizer.identity()
  assert tokenizer_id == options.data.tokenizer.identity()
  data = dataclasses.replace(run.data, tokenizer=options.data.tokenizer)
  assert (data, run.batch_size) == (options.data, 4)
  rules = run.sharding.rules
  checkpoint = trained.restore_variables(folder, run.model.build(rules), rules)
  assert checkpoint.step == 2
  jax.tree.map(
    np.testing.assert_array_equal, checkpoint.state['params'], state.params
  )
  # Another run is refused these checkpoints unless it resumes, and no folder is
  # made for it.
  with pytest.raises(ValueError, match=r'(?s)other is .*bucket/run.*--resume'):
    workdir.check(tmp_path / 'other', config)
  workdir.check(tmp_path / 'other', config, resume=True)
  assert not (tmp_path / 'other').exists()
  # The run continues from these checkpoints.
  longer = merge(config, {'total_steps': 3})
  longer_run = run_config.read(longer)
  state = loop.train_and_evaluate(longer_run, folder, devices=cpu, resume=True)
  assert int(state.step) == 3
  relocated_config = merge(longer, {'checkpoint': {'directory': ''}})
  with pytest.raises(ValueError, match=r'bucket/run; checkpoint\.directory='):
    workdir.check(folder, relocated_config, resume=True)


def test_a_run_with_checkpoints_of_its_own_keeps_them(tmp_path):
  (tmp_path / workdir.CHECKPOINTS).mkdir()  # as an imported model has
  config = tiny.config(checkpoint={'directory': 'gs://b/run'})
  with pytest.raises(ValueError, match='has its checkpoints in'):
    workdir.check(tmp_path, config)


def test_options_that_a_folder_lacks_have_their_defaults(tmp_path):
  config, defaults = tiny.config(), section_of(run_config.RunConfig)
  earlier = config.to_dict()
  del earlier['lora']  # an option that was added since
  workdir.claim(tmp_path, earlier)
  workdir.check(tmp_path, config, defaults=defaults)
  adapted = merge(config, {'lora': {'rank': 2}})
  with pytest.raises(ValueError, match=r'lora\.rank: None -> 2'):
    workdir.check(tmp_path, adapted, defaults=defaults)
  other = merge(config, {'seed': 1})
  with pytest.raises(ValueError, match='seed: 0 -> 1'):
    workdir.check(tmp_path, other, defaults=defaults)


def test_a_folder_with_options_that_are_gone_goes_on_without_them(tmp_path):
  config = tiny.config()
  earlier = config.to_dict()
  earlier['model'] |= {'feature_shape': []}
  workdir.claim(tmp_path, earlier)
  with pytest.raises(ValueError, match=r'(?s)model\.feature_shape.*commit'):
    workdir.check(tmp_path, config)
  workdir.check(tmp_path, config, resume=True)
