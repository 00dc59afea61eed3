"""A Mixtral is adapted here: transformers and peft compute the same logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import interop, models
from moe_jax.config import merge
from moe_jax.interop import verifying
from moe_jax.interop.export_run import export_run
from moe_jax.models.lora import LoraOptions, adapt
from moe_jax.models.trees import flatten, unflatten
from moe_jax.training import trained
from tests.interop import folders, oracle
from tests.interop.folders import import_run
from tests.interop.test_import_run import config_of, train

torch = pytest.importorskip('torch')
# Our name of each of transformers' projections.
OURS = 'w_query', 'w_key', 'w_value', 'w_out'
KERNEL_NAMES = dict(zip(('q_proj', 'k_proj', 'v_proj', 'o_proj'), OURS))


def check_logits(model, params, inputs, expected):
  ours, is_real = verifying.logits(model, {'params': params}, inputs, None)
  np.testing.assert_allclose(ours[is_real], expected[is_real], atol=5e-5)


@pytest.mark.slow
def test_the_same_factors_give_pefts_logits(tmp_path):
  peft = pytest.importorskip('peft')
  base = oracle.make('mixtral')
  base.save_pretrained(tmp_path)
  inputs = oracle.inputs(base)
  config = peft.LoraConfig(
    r=3, lora_alpha=5, target_modules=[*KERNEL_NAMES], init_lora_weights=False
  )
  torch.manual_seed(3)
  peft_model = peft.get_peft_model(base, config).eval()
  _, model, variables = interop.load(tmp_path)
  adapted = adapt(
    LoraOptions(rank=3, alpha=5.0, parts='attention'), models.describe(model)
  )
  flat = flatten(adapted.extend(variables['params'], jax.random.key(0)))
  state = {k: v.numpy() for k, v in peft_model.state_dict().items()}
  prefix = ('lora', 'layers', 'layer_0', 'attention')
  for projection, name in KERNEL_NAMES.items():
    for factor in 'AB':
      path = (*prefix, name, factor.lower())
      theirs = f'self_attn.{projection}.lora_{factor}.default.weight'
      layers = (f'base_model.model.model.layers.{i}' for i in range(3))
      rows = [state[f'{layer}.{theirs}'].T for layer in layers]
      flat[path] = jnp.asarray(np.stack(rows)).reshape(flat[path].shape)
  merged = adapted.merged(unflatten(flat))
  expected = oracle.logits(peft_model, inputs)
  check_logits(model, merged, inputs, expected)
  with peft_model.disable_adapter():
    before = oracle.logits(peft_model, inputs)
  assert np.abs(expected - before).max() > 0.1


@pytest.mark.slow
def test_an_imported_run_is_adapted_and_exported(tmp_path):
  folders.write(tmp_path / 'hf', 'mixtral')
  workdir = tmp_path / 'run'
  import_run(tmp_path / 'hf', workdir)
  changes = dict(lora=dict(rank=2, parts='attention + experts'), total_steps=1)
  changes |= dict(optimizer=dict(learning_rate=0.05), evals={})
  changes |= dict(checkpoint=dict(best_eval='train_capacity', keep_best=False))
  state = train(merge(config_of(workdir), changes), workdir, resume=True)
  export_run(workdir, tmp_path / 'out')
  model = oracle.CLASSES['mixtral'].from_pretrained(tmp_path / 'out').eval()
  run = trained.read(workdir)
  built = run.model.build(run.sharding.rules)
  restored = trained.restore_variables(workdir, built, run.sharding.rules)
  inputs = oracle.inputs(model)
  expected = oracle.logits(model, inputs)
  check_logits(built, restored.state['params'], inputs, expected)
  assert int(state.step) == 1
