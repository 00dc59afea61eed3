"""A Mixtral is adapted here: transformers and peft compute the same logits."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import interop, models, run_config
from moe_jax.config import merge
from moe_jax.finetuning import adapters
from moe_jax.interop.export_run import export_run
from moe_jax.models.lora import LoraOptions, adapt
from moe_jax.models.trees import flatten, unflatten
from moe_jax.training import loop, trained
from tests.interop import folders, oracle
from tests.interop.test_import_run import config_of, import_run

torch = pytest.importorskip('torch')
# Our name of each of transformers' projections.
KERNEL_NAMES = {
  'q_proj': 'w_query',
  'k_proj': 'w_key',
  'v_proj': 'w_value',
  'o_proj': 'w_out',
}


@pytest.fixture(scope='module')
def source(tmp_path_factory):
  """A Mixtral of transformers, its folder, and inputs."""
  model = oracle.make('mixtral')
  folder = tmp_path_factory.mktemp('mixtral')
  model.save_pretrained(folder)
  return model, folder, oracle.inputs(model)


def logits(model, params, inputs):
  mask = jnp.asarray(inputs['attention_mask'])
  batch = dict(
    tokens=jnp.asarray(inputs['input_ids'], jnp.int32),
    segment_ids=mask.astype(jnp.int32),
    positions=(jnp.cumsum(mask, 1) - 1).astype(jnp.int32),
  )
  apply = jax.jit(lambda p: model.apply({'params': p}, **batch)[0])
  return np.asarray(apply(params))


def unpadded(values, inputs):
  return values[inputs['attention_mask'] > 0]


@pytest.mark.slow
def test_the_same_factors_give_pefts_logits(source):
  peft = pytest.importorskip('peft')
  _, folder, inputs = source
  base = oracle.CLASSES['mixtral'].from_pretrained(folder).eval()
  config = peft.LoraConfig(
    r=3, lora_alpha=5, target_modules=[*KERNEL_NAMES], init_lora_weights=False
  )
  torch.manual_seed(3)
  peft_model = peft.get_peft_model(base, config).eval()
  _, model, variables = interop.load(folder)
  adapted = adapt(
    LoraOptions(rank=3, alpha=5.0, parts='attention'), models.describe(model)
  )
  flat = flatten(adapted.extend(variables['params'], jax.random.key(0)))
  state = {k: v.numpy() for k, v in peft_model.state_dict().items()}
  prefix = ('lora', 'layers', 'layer_0', 'attention')
  for projection, name in KERNEL_NAMES.items():
    for factor in 'AB':
      path = (*prefix, name, factor.lower())
      rows = [
        state[
          f'base_model.model.model.layers.{i}.self_attn.{projection}.lora_'
          f'{factor}.default.weight'
        ].T
        for i in range(3)
      ]
      flat[path] = jnp.asarray(np.stack(rows)).reshape(flat[path].shape)
  merged = adapted.merged(unflatten(flat))
  expected = unpadded(oracle.logits(peft_model, inputs), inputs)
  merged_logits = unpadded(logits(model, merged, inputs), inputs)
  np.testing.assert_allclose(merged_logits, expected, atol=5e-5)
  with peft_model.disable_adapter():
    before = unpadded(oracle.logits(peft_model, inputs), inputs)
  assert np.abs(expected - before).max() > 0.1


@pytest.mark.slow
def test_an_imported_run_is_adapted_exported_and_kept_small(tmp_path):
  folders.write(tmp_path / 'hf', 'mixtral')
  workdir, twin = tmp_path / 'run', tmp_path / 'twin'
  import_run(tmp_path / 'hf', workdir)
  shutil.copytree(workdir, twin)
  lora = dict(rank=2, parts='attention + experts')
  config = merge(
    config_of(workdir),
    dict(
      lora=lora,
      optimizer=dict(learning_rate=0.05),
      evals={},
      checkpoint=dict(best_eval='train_capacity', keep_best=False),
      total_steps=1,
    ),
  )
  options = run_config.read(config)
  state = loop.train_and_evaluate(
    options, workdir, devices=jax.devices()[:1], resume=True
  )
  export_run(workdir, tmp_path / 'out')
  model = oracle.CLASSES['mixtral'].from_pretrained(tmp_path / 'out').eval()
  run = trained.read(workdir)
  built = run.model.build(run.sharding.rules)
  restored = trained.restore_variables(workdir, built, run.sharding.rules)
  inputs = oracle.inputs(model)
  run_logits = logits(built, restored.state['params'], inputs)
  expected = unpadded(oracle.logits(model, inputs), inputs)
  np.testing.assert_allclose(unpadded(run_logits, inputs), expected, atol=5e-5)
  # The small folder on the imported base is the same model again.
  assert 'factors' in adapters.save(workdir, tmp_path / 'adapter')
  adapters.merge(tmp_path / 'adapter', twin, tmp_path / 'merged')
  export_run(tmp_path / 'merged', tmp_path / 'again')
  for name, value in interop.load(tmp_path / 'again').variables.items():
    jax.tree.map(np.testing.assert_array_equal, value, restored.state[name])
  assert int(state.step) == 1
