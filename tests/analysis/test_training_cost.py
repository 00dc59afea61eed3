"""The cost of training a part: the formula against XLA's count."""

import functools

import jax
import pytest

from moe_jax.analysis import cost
from moe_jax.partitioning import make_mesh
from moe_jax.training.programs import make_programs
from tests.models import tiny as models_tiny
from tests.training import tiny

V, M, F, H, D, E, K = 300, 48, 80, 3, 16, 4, 2
ROWS, T = 8, 96
KERNELS = {'attention': 4 * M * H * D, 'ffn': 2 * M * F, 'experts': 2 * M * F}


@functools.cache
def options_of(trainable='all', lora=(), tie=False, remat='none'):
  # Room for exactly the choices of tokens, so that no slot stays empty.
  capacity = dict(kind='per_assignment', per_assignment=dict(factor=1.0))
  moe = dict(num_experts=E, num_selected=K, capacity=capacity)
  # The formula leaves out scores that are computed again.
  attention = dict(num_heads=H, implementation='einsum')
  model = dict(vocab_size=V, width=M, scan_layers=False, attention=attention)
  model |= dict(ffn=dict(hidden=F), embedding=dict(tie=tie), moe=moe)
  model |= dict(remat=remat)
  run = dict(batch_size=ROWS, data=dict(seq_len=T), model=model)
  return tiny.options(trainable=trainable, lora=dict(lora), **run).filled(V)


def cost_of(*args, **kwargs):
  options = options_of(*args, **kwargs)
  return cost.training_cost(options, options.build())


@functools.cache
def xla_flops(*args, **kwargs):
  """FLOPs of the lowered step, elementwise operations included."""
  options = options_of(*args, **kwargs)
  model = options.build()
  mesh = make_mesh({'data': 1}, jax.devices()[:1])
  programs = make_programs(options, model, mesh)
  shapes = options.batch_shapes(model)
  lowered = programs.train_step.lower(programs.abstract_state, shapes)
  return float(lowered.cost_analysis()['flops'])


def test_a_told_example():
  # Two layers, the second sparse: kernels of experts hold E pairs, and a token
  # meets K of them, once for its own gradient and once for the kernel's.
  attention, ffn, expert = KERNELS.values()
  experts = cost_of('experts')
  assert experts.trained_params == E * expert
  assert experts.optimizer_bytes == 2 * 4 * experts.trained_params + 2 * 4
  assert experts.gradient_bytes == 4 * experts.trained_params
  all_parts, non_experts = cost_of('all'), cost_of('non_experts')
  kernel_flops = 2 * K * expert
  outputs = 2 * (2 * attention + ffn + K * expert)
  outputs += 2 * M * E + 2 * V * M + 2 * (4 * 2 * T * H * D)
  assert experts.backward_flops == outputs + kernel_flops
  assert all_parts.backward_flops == non_experts.backward_flops + kernel_flops
  # Adapters of attention: a pair for each of four kernels in two layers.
  lora = cost_of(lora=(('rank', 5),))
  assert lora.trained_params == 2 * 4 * 5 * (M + H * D)
  assert lora.backward_flops == outputs + 2 * 2 * attention
  assert lora.gradient_bytes == 4 * (lora.trained_params + 2 * attention)
  assert lora.step_flops == 3 * 2 * 5 * 2 * attention


@pytest.mark.slow
@pytest.mark.parametrize(
  ('costly', 'cheap'),
  [
    (dict(lora=(('rank', 40), ('parts', 'experts'))), dict(trainable='norms')),
    (dict(tie=True), dict(trainable='-embeddings', tie=True)),
  ],
  ids=str,
)
def test_the_compiler_counts_the_same_difference(costly, cheap):
  high_cost, low_cost = cost_of(**costly), cost_of(**cheap)
  expected = ROWS * T * (high_cost.backward_flops - low_cost.backward_flops)
  expected += high_cost.step_flops - low_cost.step_flops
  # The rest is elementwise (the optimizer, softmax, activations); compilers
  # of different age count between 4 % and 7 % for it.
  difference = xla_flops(**costly) - xla_flops(**cheap)
  assert difference == pytest.approx(expected, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize('remat', ['none', 'dots', 'save=attention,hidden'])
def test_the_compiler_counts_what_is_not_computed_again(remat):
  most, some = (
    cost.count(options_of(remat=name).build(), T).recomputed_flops
    for name in ('full', remat)
  )
  saved = xla_flops(remat='full') - xla_flops(remat=remat)
  # Elementwise operations are computed again unless all is kept.
  rel = 0.1 if remat == 'none' else 0.02
  assert saved == pytest.approx(ROWS * T * (most - some), rel=rel)


def test_a_model_of_two_stacks_is_refused():
  model = models_tiny.build(kind='encoder_decoder')
  with pytest.raises(ValueError, match='has 2 stacks of blocks'):
    cost.training_cost(options_of(), model)
