"""Runs in codes of few bits: made layer by layer, evaluated, generated from."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import evaluation, finetuning, generation, run_config
from moe_jax.compression import (
  __main__ as command,
)
from moe_jax.compression import (
  calibration,
  distill,
  extract,
  fewer,
  gptq,
  quantize,
  teacher_logits,
  whole_run,
)
from moe_jax.config import OptionError
from moe_jax.kernels.kernel_format import KernelFormat
from moe_jax.models import RunShape, code_trees
from moe_jax.models.encoder_decoder import EncoderOptions
from moe_jax.models.trees import describe, flatten
from moe_jax.training import setup
from tests.compression import test_distill
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


@pytest.fixture(scope='module', name='int8')
def make_int8(folder):
  return encode(folder, 'int8', 'int8', method='rtn')[0]


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
  inputs = [
    calibration.capture(run.model, {'params': params}, batch)[2]
    for batch in batches
  ]
  masks = [
    calibration.counted(batch, '', run.options.tokenizer) for batch in batches
  ]
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


def test_lines_tell_errors_zeros_and_bits(int2):
  assert len(int2[1]) == 2
  for layer, line in zip((1, 2), int2[1], strict=True):
    assert line.startswith(f'layer {layer}: error of RTN 0.')
    assert 'of GPTQ 0.' in line and '% ;' not in line
    assert 'bits a weight 2.00 of codes' in line


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
  assert whole_run.bytes_in_memory(prepared) == whole_run.bytes_in_memory(
    run.variables
  )
  entry = evaluation.LossEvaluation(num_batches=1)
  numbers_run = whole_run.write(
    whole_run.read(new), tmp_path / 'numbers', params, options
  )
  losses = [evaluation.evaluate(f, entry)['loss'] for f in (new, numbers_run)]
  np.testing.assert_allclose(*losses, rtol=1e-5)


def test_all_experts_are_in_codes_and_nothing_else(folder, int8):
  run, new = (whole_run.read(path) for path in (folder, int8))
  plain = run.variables['params']
  assert {path[-2:] for path in coded_kernels(new)} == {
    ('experts', 'w_in'),
    ('experts', 'w_out'),
  }
  decoded = numbers_of(new)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=0.03), decoded, plain
  )
  # Beside the arrays, there are their names and the checkpoint's metadata.
  disk = whole_run.bytes_on_disk(int8)
  assert 0 < disk - whole_run.bytes_in_memory(new.variables) < 40_000


def test_codes_are_not_trained(int2):
  config = json.loads((int2[0] / 'config.json').read_text())
  with pytest.raises(OptionError, match=r'int2.*not trained; train the run'):
    run_config.from_file(int2[0] / 'config.json')
  assert config['model']['moe']['expert']['kind'] == 'quantized'


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


@pytest.mark.parametrize(
  ('format', 'options', 'message'),
  [
    ('int8', {'method': 'obq'}, "unknown method 'obq'.*'gptq'"),
    ('int8', {'num_batches': 0}, 'num_batches=0 must be at least 1'),
  ],
)
def test_what_cannot_be_is_refused(folder, format, options, message):
  with pytest.raises(ValueError, match=message):
    encode(folder, 'refused', format, **options)


def test_runs_without_kernels_to_round_are_refused(int2, tmp_path):
  with pytest.raises(ValueError, match='in codes already'):
    encode(int2[0], 'again', 'int8')
  dense = tmp_path / 'dense'
  folders.write(dense, model={'moe': {'num_experts': 0}})
  with pytest.raises(ValueError, match='no experts to quantise'):
    encode(dense, 'new', 'int8')


@pytest.mark.slow
def test_the_command_says_what_it_made(folder, tmp_path, capsys):
  new = tmp_path / 'int4'
  command.main(
    [
      'quantize',
      f'--run={folder}',
      f'--output={new}',
      '--format=int4',
      '--method=rtn',
    ]
  )
  output = capsys.readouterr().out
  assert 'layer 2: error of RTN' in output
  assert '4.00 bits a weight of codes and ' in output
  assert whole_run.read(new).options.model.moe.expert.format.name == 'int4'


def test_a_command_quantises_the_checkpoint_of_a_step(tmp_path):
  run, outputs = tmp_path / 'run', []
  params = folders.write(run, steps=(2, 3), model=MODEL)
  for step in (2, 3):
    output = tmp_path / f'int8_{step}'
    # Without a flag it is the newest checkpoint, that of step 3.
    step_flags = [f'--step={step}'] * (step == 2)
    arguments = [
      '--format=int8',
      '--method=rtn',
      f'--output={output}',
      *step_flags,
    ]
    command.main(['quantize', f'--run={run}', *arguments])
    new = whole_run.read(output)
    outputs.append(numbers_of(new))
  for output, step_params in zip(outputs, params.values(), strict=True):
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, atol=0.03),
      output,
      step_params,
    )


def test_batches_without_effect_are_refused(folder, tmp_path, capsys):
  arguments = [f'--run={folder}', f'--output={tmp_path}/new', '--format=int4']
  with pytest.raises(SystemExit):
    command.main(['quantize', *arguments, '--method=rtn', '--batches=8'])
  assert (
    '--batches=8 has no effect with --method=rtn' in capsys.readouterr().err
  )
  assert not list(tmp_path.iterdir())


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
    has_note = [
      line.endswith('; H = I for experts [3] (no tokens)') for line in lines
    ]
    assert has_note == [method == 'gptq'] * 2
    loaded = whole_run.read(new)
    trees = loaded.model.stacks.layer_trees(loaded.variables['params'])
    experts[method] = [trees[layer]['moe']['experts'] for layer in (1, 2)]
  for rtn, gptq_ in zip(*experts.values(), strict=True):
    for name in ('w_in', 'w_out'):
      codes = rtn[name]['codes'], gptq_[name]['codes']
      equal = [np.array_equal(*(x[e] for x in codes)) for e in range(4)]
      assert equal[3] and not any(equal[:2])


def test_no_run_begins_with_codes(int2, tmp_path):
  options = tiny.options(model=MODEL, init_from={'workdir': str(int2[0])})
  run = setup.set_up(options, tmp_path / 'new', devices=jax.devices()[:1])
  with pytest.raises(ValueError, match='begin with the run that they were mad'):
    finetuning.initial(run)


def test_codes_are_not_merged_extracted_or_taught_from(int2, tmp_path):
  run, reason = whole_run.read(int2[0]), 'has kernels in codes of few bits'
  with pytest.raises(ValueError, match=f'int2 {reason}'):
    fewer.calibrated(run, 1)
  with pytest.raises(ValueError, match=f'the model {reason}'):
    extract.extract(run.options.model, run.variables['params'], 0)
  numbers = dict(seed=0, batch_size=4, batches=1, top=1)
  with pytest.raises(ValueError, match=f'int2 {reason}'):
    teacher_logits.write(int2[0], tmp_path, run.options.data, **numbers)
  config = test_distill.config_of(int2[0])
  student = run_config.read(config)
  student = setup.set_up(student, tmp_path / 'a', devices=jax.devices()[:1])
  with pytest.raises(ValueError, match=f'distill.teacher=.*int2 {reason}'):
    distill.Distilling().initial(student)


def test_kernels_without_a_factor_are_named():
  format = KernelFormat('int8')
  # Their products are zero, with tokens or without.
  outcome = gptq.to_nearest(jnp.ones((3, 4, 2)), format)
  outcome = outcome._replace(plain=np.array([False, True, True]))
  outcomes = dict.fromkeys(('w_in', 'w_out'), outcome)
  stored = dict.fromkeys(outcomes, format.store(outcome.codes, outcome.grid))
  _, line = quantize.report(outcomes, stored, [2])
  assert line.endswith(
    '; H = I for experts [2] (no tokens); H = I for experts [1] (no factor)'
  )
