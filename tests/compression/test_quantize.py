"""Runs in codes of few bits: made layer by layer, evaluated, generated from."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import evaluation, finetuning, generation, run_config
from moe_jax.compression import __main__ as command
from moe_jax.compression import (
  calibration,
  distill,
  extract,
  fewer,
  gptq,
  quantize,
  teacher_logits,
  whole_run,
)  # fmt: skip
from moe_jax.kernels.kernel_format import KernelFormat
from moe_jax.models import RunShape, code_trees
from moe_jax.models.encoder_decoder import EncoderOptions
from moe_jax.models.trees import describe, flatten
from tests.compression import test_distill
from tests.finetuning.test_start import set_up
from tests.generation import folders
from tests.models import tiny as models_tiny
from tests.training import tiny

MODEL = {'num_layers': 3, 'moe': {'layers': '1,2', 'num_selected': 2}}
BATCHES = 2


@pytest.fixture(scope='module', name='folder')
def make_folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('runs') / 'run'
  folders.write(folder, model=MODEL)
  return folder


def encode(folder, name, format, **options):
  """The folder of the run in a format, and the lines about its layers."""
  new, lines = folder.with_name(name), []
  format = KernelFormat(format) if isinstance(format, str) else format
  options = {'num_batches': BATCHES, **options}
  quantize.quantize(folder, new, format, message=lines.append, **options)
  return new, lines


@pytest.fixture(scope='module', name='int2')
def make_int2(folder):
  return encode(folder, 'int2', 'int2')


@pytest.fixture(scope='module', name='ternary')
def make_ternary(folder):
  return encode(folder, 'ternary', 'ternary', method='rtn')[0]


@functools.cache
def _decoding(options):
  return jax.jit(lambda params: code_trees.decoded(options, params)[1])


def coded_kernels(run):
  """The paths of kernels that a run stores in codes."""
  paths = flatten(run.variables['params'])
  return [path[:-1] for path in paths if path[-1] == 'codes']


def numbers_of(run):
  """The parameters of a run in codes as numbers."""
  return _decoding(run.options.model)(run.variables['params'])


def params_before_layer(layer, run, decoded):
  """The decoded parameters, with those of one layer before its rounding."""

  def choose(path, new, old):
    place = run.model.stacks.place_of(tuple(key.key for key in path))
    if place is None or layer not in place.layers:
      return new
    return new.at[place.layers.index(layer)].set(old[place.layers.index(layer)])

  old = run.variables['params']
  return jax.tree_util.tree_map_with_path(choose, decoded, old)


@pytest.mark.slow
def test_each_layer_reads_what_rounded_layers_give(folder, int2):
  run, new = whole_run.read(folder), whole_run.read(int2[0])
  decoded = numbers_of(new)
  format = KernelFormat('int2')
  params = params_before_layer(2, run, decoded)
  batches = calibration.batches(run, BATCHES)
  inputs, masks = [], []
  for batch in batches:
    captured = calibration.capture(run.model, {'params': params}, batch)
    inputs.append(captured[2])
    masks.append(calibration.counted(batch, '', run.options.tokenizer))
  rows = calibration.ExpertTokens(inputs, masks).rows(slice(None))
  old, rounded = (
    run.model.stacks.layer_trees(tree)[2]['moe']['experts']
    for tree in (run.variables['params'], decoded)
  )
  h = gptq.hessian(jnp.asarray(rows.x), jnp.asarray(rows.filled))
  for name in ('w_in', 'w_out'):
    grid = format.grid(old[name])
    factor = jax.jit(gptq.factor)(h)
    round_ = jax.jit(gptq.gptq, static_argnums=1)
    expected = format.values(round_(old[name], format, grid, factor), grid)
    np.testing.assert_allclose(rounded[name], expected, atol=1e-6)
    hidden = jax.nn.gelu(rows.x @ rounded['w_in'], approximate=False)
    h = gptq.hessian(hidden, jnp.asarray(rows.filled))


def test_bits_add_up_to_the_bytes_of_stored_arrays(folder, tmp_path):
  # Layers and kernels have different numbers of codes, and are filled up.
  new, format = tmp_path / 'new', KernelFormat('ternary')
  numbers = quantize.quantize(
    folder, new, format, method='rtn', message=lambda line: None
  )
  run = whole_run.read(new)
  num_bytes = weights = 0
  plain = flatten(whole_run.read(folder).variables['params'])
  for path in coded_kernels(run):
    stored_kernel = functools.reduce(dict.get, path, run.variables['params'])
    num_bytes += sum(array.nbytes for array in stored_kernel.values())
    weights += plain[path].size
  bits = numbers['code bits'] + numbers['metadata bits']
  assert bits == pytest.approx(8 * num_bytes / weights, rel=1e-9)


@pytest.mark.slow
def test_it_generates_and_is_evaluated_as_the_numbers_are(ternary, tmp_path):
  new = ternary
  run = generation.load(new)
  options, params = code_trees.decoded(
    run.options.model, run.variables['params']
  )
  prompts = [[7, 70, 111], [40, 41, 42]]
  texts = [
    generation.generate(model, variables, prompts, num_tokens=6).tokens
    for model, variables in (
      (run.model, run.variables),
      (options.build(), {'params': params}),
    )
  ]
  np.testing.assert_array_equal(*texts)
  prepared = generation.prepare(run.model, run.variables)[1]
  dtypes = {leaf.dtype.name for leaf in jax.tree.leaves(prepared)}
  assert dtypes & {'uint8', 'uint16'}
  # Codes alone are in memory, before and after the layout for decoding.
  in_memory = whole_run.bytes_in_memory
  assert in_memory(prepared) == in_memory(run.variables)
  entry = evaluation.LossEvaluation(num_batches=1)
  numbers_run = whole_run.write(
    whole_run.read(new), tmp_path / 'numbers', params, options
  )
  losses = [evaluation.evaluate(f, entry)['loss'] for f in (new, numbers_run)]
  np.testing.assert_allclose(*losses, rtol=1e-5)


def test_an_encoder_alone_has_experts_in_codes():
  options = models_tiny.options(
    {'num_experts': 0, 'layers': '0'},
    'encoder_decoder',
    num_layers=1,
    encoder=EncoderOptions(0, {'moe': {'num_experts': 5}}),
  )
  assert not code_trees.has_codes(options)
  coded = code_trees.with_formats(options, KernelFormat('int4'))
  assert code_trees.has_codes(coded)
  paths = flatten(describe(coded.build()).shapes)
  assert {p[0] for p in paths if p[-1] == 'codes'} == {'encoder'}
  (problem,) = coded.problems_in(RunShape(1, 1, 1, models_tiny.T))
  assert problem.startswith("model.encoder.overrides.moe.expert.format.name='")


def test_a_command_quantises_the_checkpoint_of_a_step(tmp_path):
  run, output = tmp_path / 'run', tmp_path / 'int8'
  bias = {'token_choice': {'gates': 'sigmoid', 'balance_bias_rate': 0.1}}
  model = {**MODEL, 'moe': {**MODEL['moe'], 'router': bias}}
  params = folders.write(run, steps=(2, 3), model=model)
  flags = ['--format=int8', '--method=rtn', '--step=2', f'--output={output}']
  command.main(['quantize', f'--run={run}', *flags])
  new = whole_run.read(output)
  names = {path[-2:] for path in coded_kernels(new)}
  assert names == {('experts', 'w_in'), ('experts', 'w_out')}
  models_tiny.assert_trees_close(numbers_of(new), params[2], atol=0.03)
  states = (x.variables['router_state'] for x in (new, whole_run.read(run)))
  models_tiny.assert_trees_close(*states, atol=0)
  # Beside the arrays, there are their names and the checkpoint's metadata.
  disk = whole_run.bytes_on_disk(output)
  assert 0 < disk - whole_run.bytes_in_memory(new.variables) < 40_000


def test_an_expert_without_tokens_is_rounded_to_the_nearest(tmp_path):
  run = tmp_path / 'run'

  def without_expert_3(params):
    """The two largest of v, -v, 0 and 0 are always among the first three."""

    def change(path, leaf):
      if [key.key for key in path[-2:]] != ['router', 'w']:
        return leaf
      v = leaf[..., 0]
      return jnp.stack([v, -v, 0 * v, 0 * v], -1)

    return jax.tree_util.tree_map_with_path(change, params)

  folders.write(run, model=MODEL, change=without_expert_3)
  experts = {}
  for method in ('rtn', 'gptq'):
    new, lines = encode(run, method, 'int2', method=method)
    note = '; H = I for experts [3] (no tokens)'
    assert [line.endswith(note) for line in lines] == [method == 'gptq'] * 2
    loaded = whole_run.read(new)
    trees = loaded.model.stacks.layer_trees(loaded.variables['params'])
    experts[method] = [trees[layer]['moe']['experts'] for layer in (1, 2)]
  for rtn, gptq_ in zip(*experts.values(), strict=True):
    for name in ('w_in', 'w_out'):
      codes = rtn[name]['codes'], gptq_[name]['codes']
      equal = [np.array_equal(*(x[e] for x in codes)) for e in range(4)]
      assert equal[3] and not any(equal[:2])


def test_codes_are_neither_trained_nor_begun_with(folder, int2, tmp_path):
  run, reason = whole_run.read(int2[0]), 'has kernels in codes of few bits'
  numbers = dict(seed=0, batch_size=4, batches=1, top=1)
  config = test_distill.config_of(int2[0])
  tuned_config = tiny.config(model=MODEL, init_from={'workdir': str(int2[0])})
  student, tuned = (set_up(c, tmp_path / 'a') for c in (config, tuned_config))
  for message, call in {
    r'int2.*not trained; train the run': lambda: run_config.from_file(
      int2[0] / 'config.json'
    ),
    'begin with the run that they were mad': lambda: finetuning.initial(tuned),
    f'int2 {reason}': lambda: fewer.calibrated(run, 1),
    f'the model {reason}': lambda: extract.extract(
      run.options.model, run.variables['params'], 0
    ),
    f'.int2 {reason}': lambda: teacher_logits.write(
      int2[0], tmp_path, run.options.data, **numbers
    ),
    f'distill.teacher=.*int2 {reason}': lambda: distill.Distilling().initial(
      student
    ),
    'in codes already': lambda: encode(int2[0], 'again', 'int8'),
  }.items():
    with pytest.raises(ValueError, match=message):
      call()
