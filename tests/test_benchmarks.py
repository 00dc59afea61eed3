"""Benchmarks time the programs that they name, and print every row."""

import contextlib
import dataclasses
import functools
import json
import math
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import (
  bench_accelerator,
  bench_attention,
  bench_flips,
  bench_generation,
  bench_loss,
  bench_moe_layer,
  bench_overhead,
  bench_prepare,
  bench_train_step,
)
from experiments.benchmarks import (
  moe_layer,
  peer_steps,
  random_reads,
  roofline,
  timing,
  train_step_programs,
)
from experiments.benchmarks.turns import turns
from moe_jax import data, models
from moe_jax.cli import load_config
from moe_jax.kernels import BACKENDS
from moe_jax.layers import Dropless, Gather
from moe_jax.runs.checkpointer import Checkpointer
from tests.training import tiny

N, M, F, E, K = 24, 8, 12, 4, 2
SIZES = moe_layer.Sizes(num_tokens=N, width=M, hidden=F)


def test_every_case_runs_once_a_round_and_the_first_one_turns():
  calls = []
  cases = {name: lambda name=name: calls.append(name) for name in 'abc'}
  times = timing.interleave(cases, seconds=0, least=4)
  rounds = [''.join(calls[i : i + 3]) for i in range(0, len(calls), 3)]
  # The first round warms up.
  assert rounds == ['abc', 'abc', 'bca', 'cab', 'abc']
  assert [len(durations) for durations in times.values()] == [4, 4, 4]
  times = timing.interleave({'a': lambda: None}, seconds=60, most=3)
  assert len(times['a']) == 3


def test_ratios_are_taken_within_a_round():
  # The ratios are 2, 3 and 1, while the machine slowed down: the median is
  # neither the ratio of medians (1) nor that of sums (2.4).
  ratio = timing.ratio([2.0, 30.0, 4.0], [1.0, 10.0, 4.0])
  assert ratio == timing.Spread(1.5, 2.0, 2.5)
  assert f'{timing.Spread.of([1.0, 2.0, 3.0]):.1f}' == '2.0 (1.5-2.5)'


def test_choices_differ_and_are_skewed_as_they_say():
  K, rng = 3, np.random.default_rng(0)
  for name, p in (('zipf', 1 / np.arange(1, 6)), ('uniform', np.ones(5))):
    choices = moe_layer.draw_choices(rng, name, 20_000, 5, K)
    assert choices.shape == (20_000, K)
    assert (np.diff(np.sort(choices, axis=1), axis=1) > 0).all()
    first = np.bincount(choices[:, 0], minlength=5) / 20_000
    np.testing.assert_allclose(first, p / p.sum(), atol=0.02)


@pytest.fixture(scope='module')
def bound_cases():
  """All cases, compiled once: (layer, compilations, inputs and outputs)."""
  layer = moe_layer.Layer.draw(SIZES, E)
  names = [*moe_layer.LAYERS, *moe_layer.OTHERS]
  compilations = moe_layer.compile_cases(layer, K, True, names)
  by_routing = {}
  for routing in moe_layer.ROUTINGS:
    inputs = moe_layer.Inputs.draw(layer, routing, K)
    programs = moe_layer.bind(layer, compilations, inputs, K, True)
    by_routing[routing] = inputs, {n: p.run() for n, p in programs.items()}
  return layer, compilations, by_routing


def results_in(folder):
  """The results that a benchmark wrote."""
  (path,) = folder.glob('*/*/results.json')
  return json.loads(path.read_text(encoding='utf-8'))


@pytest.mark.slow
def test_the_router_sends_tokens_where_the_draw_says(bound_cases):
  layer, compilations, by_routing = bound_cases
  for inputs, results in by_routing.values():
    for name in moe_layer.LAYERS:
      load = results[name][1].stats.load
      np.testing.assert_array_equal(load, inputs.load)
  inputs, _ = by_routing['zipf']
  assert inputs.load[0] > 1.5 * inputs.load[-1]
  assert inputs.load.sum() == K * N
  other = dataclasses.replace(inputs, load=inputs.load[::-1])
  with pytest.raises(ValueError, match=r'not the .* that were drawn'):
    moe_layer.bind(layer, compilations, other, K, True)


def assert_same(a, b):
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=1e-5), a, b
  )


@pytest.mark.slow
def test_products_of_the_same_groups_compute_the_same(bound_cases):
  # A baseline with less work would make the layer look slow, or fast.
  _, _, by_routing = bound_cases
  _, results = by_routing['zipf']
  ffn = moe_layer.GROUPED[0]
  for name in (moe_layer.GROUPED[1], moe_layer.RAGGED):
    assert_same(results[name], results[ffn])
  equal = results[ffn + moe_layer.EQUAL]
  for name in moe_layer.BATCHED:
    assert_same(results[name], equal)
  assert not np.allclose(equal[0], results[ffn][0])  # the groups do differ
  assert_same(results[moe_layer.PLAIN_DENSE], results[moe_layer.DENSE])


def test_the_limit_is_the_fastest_of_the_same_shapes():
  equal = [name + moe_layer.EQUAL for name in moe_layer.GROUPED]
  times = {
    moe_layer.BATCHED[0]: [3.0, 3.0],
    moe_layer.BATCHED[1]: [2.0, 9.0],
    equal[0]: [4.0, 4.0],
    equal[1]: [5.0, 5.0],
    moe_layer.GROUPED[0]: [3.5, 3.5],
    moe_layer.GROUPED[1]: [1.0, 9.0],
    moe_layer.DENSE: [0.1, 0.1],  # no grouped product
  }
  limit = bench_moe_layer.fastest_limit
  assert limit(times, 'gather', 'zipf') == moe_layer.BATCHED[0]
  assert limit(times, 'dropless', 'zipf') == moe_layer.GROUPED[0]
  assert limit(times, 'dropless', 'uniform') == moe_layer.BATCHED[0]


@pytest.mark.slow
def test_the_layer_benchmark_writes_every_row(
  bound_cases, tmp_path, monkeypatch
):
  # Its programs are those of `bound_cases`, as all have arrays of one seed.
  _, compilations, _ = bound_cases
  compile_cases = moe_layer.compile_cases

  def compile_what_is_new(layer, K, backward, names):
    if names == moe_layer.LAYERS:  # those of the second table
      return compile_cases(layer, K, backward, names)
    return compilations

  monkeypatch.setattr(moe_layer, 'compile_cases', compile_what_is_new)
  bench_moe_layer.main(
    [
      *f'--tokens {N} --width {M} --hidden {F} --experts {E}'.split(),
      *f'--selected {K} --scaling 2 4 --rows_per_expert 6'.split(),
      *['--forward_selected', '--seconds', '0', '--rough_peaks'],
      f'--output={tmp_path}',
    ]
  )
  results = results_in(tmp_path)
  rows = results['rows']
  cases = {
    *moe_layer.LAYERS, moe_layer.DENSE, moe_layer.PLAIN_DENSE,
    *moe_layer.BATCHED, moe_layer.RAGGED, *moe_layer.GROUPED,
    *(name + moe_layer.EQUAL for name in moe_layer.GROUPED),
  }  # fmt: skip
  assert sorted((r['E'], r['routing'], r['case']) for r in rows) == sorted(
    (E, routing, case) for routing in moe_layer.ROUTINGS for case in cases
  )
  for row in rows:
    assert row['ms'] > 0 and row['fraction'] > 0
    if row['case'] in moe_layer.LAYERS:
      products = round(2 * row['served'] * N * K * 2 * M * F)
      assert row['flops'] == 3 * (products + 2 * N * M * E)
      assert row['limit'] in cases
    if row['case'] == moe_layer.DENSE:
      assert row[f'per_{moe_layer.DENSE}'] == 1
  growth = {(r['E'], r['case']): r for r in results['scaling']}
  assert growth[2, 'gather']['growth'] == 1
  assert growth[4, 'dropless']['tokens'] == 24
  assert growth[4, 'dropless']['gradient_bytes'] == 4 * 4 * 2 * M * F


def accelerator_rows(folder, *options):
  argv = ['--tiny', '--models', 'DeepSeek-V3', '--seconds=0', *options]
  bench_accelerator.main([*argv, f'--output={folder}'])
  rows = results_in(folder)['rows']
  return {(row['case'], row['routing']): row for row in rows}


def test_the_accelerator_benchmark_names_what_fails(tmp_path, monkeypatch):
  def fails(*_):
    raise NotImplementedError('no kernel | for these rows\nand kernels')

  backend = types.SimpleNamespace(matmul=fails, outer=fails)
  monkeypatch.setitem(BACKENDS, 'megablox', backend)
  names = ['ragged_dot', 'megablox', 'blocks']
  rows = accelerator_rows(tmp_path, '--backends', *names)
  routings = ('Zipf', 'replayed', 'even')
  cells = [(name, routing) for routing in routings for name in names]
  assert [*rows] == [('dense', ''), *cells]
  # 48 tokens have 2 choices each of 4 experts, of 3 kernels of 56 x 16; the
  # backward pass has twice the products of the forward pass.
  flops = 3 * 2 * 48 * 2 * 3 * 56 * 16
  for (name, routing), row in rows.items():
    assert row['flops'] == flops
    if name == 'megablox':
      assert 'no kernel' in row['error'] and 'tflops' not in row
    else:
      assert row['tflops'] * row['ms'] == pytest.approx(flops / 1e9)
      assert row['share'] > 0 and row['per_dense'] > 0 and 'error' not in row
    if routing:
      # Choices of Zipf are replayed on tokens of which each expert would have
      # as many as any other.
      load = rows['blocks', 'Zipf']['load']
      assert row['load'] == (1 if routing == 'even' else load) and load > 1.3
  (path,) = tmp_path.glob('*/*/table.md')
  table = path.read_text(encoding='utf-8').splitlines()
  lines = [line for line in table if line.startswith('| DeepSeek')]
  assert len(lines) == 10 and len({line.count('|') for line in lines}) == 1
  assert '4 of 32' in lines[0] and 'no kernel / for these rows |' in lines[2]


def test_backends_that_disagree_are_named():
  aux = types.SimpleNamespace(stats=types.SimpleNamespace(load=np.array([3])))
  y = jnp.arange(1.0, 5)
  check = functools.partial(bench_accelerator.check, load=np.array([3]))
  first = y, aux, {'w': y}
  check((1.01 * y, aux, {'w': y}), others={'blocks': first})
  for wrong in (1.1 * y, jnp.full(4, jnp.nan)):
    with pytest.raises(ValueError, match='differ from those of blocks'):
      check((y, aux, {'w': wrong}), others={'blocks': first})
  with pytest.raises(ValueError, match='experts that were drawn'):
    check(first, load=np.array([2]), others={})


def test_the_accelerator_benchmark_ends_in_time(tmp_path):
  rows = accelerator_rows(tmp_path, '--minutes=0', '--backends=blocks')
  assert all('0 minutes are over' in row['error'] for row in rows.values())


@pytest.mark.slow
def test_a_step_that_is_timed_is_a_training_step():
  config = load_config('configs/tiny_switch.py:runlocal')
  twin = train_step_programs.prepared(
    config, bench_train_step.variants()[bench_train_step.TWIN]
  )
  step = train_step_programs.compile_step(twin)
  step.run()
  step.run()  # the donated state is not used again
  params = 257 * 32 + 2 * (4 * 32 * 32 + 2 * 32 * 48) + 5 * 32
  # The state has Adam's two moments with two counts, the step and the seed.
  state = 4 * (3 * params + 4)
  assert step.work.min_bytes == 4 * 4 * params + 2 * state
  assert step.numbers['argument_bytes'] >= state


def test_variants_differ_from_the_config_in_what_they_say():
  config = load_config('configs/tiny_switch.py:runlocal')
  variants = {
    name: train_step_programs.prepared(config, overrides).model
    for name, overrides in bench_train_step.variants().items()
  }
  assert variants['dense twin'].moe.num_experts == 0
  assert variants['sparse'].moe.dispatch == Gather()
  assert variants['sparse, dropless'].moe.dispatch == Dropless()
  assert variants['sparse, remat full'].remat == 'full'
  assert variants['sparse, remat dots'].remat == 'dots'
  assert variants['sparse'].remat == 'none'


@pytest.fixture(scope='module')
def one_layer(tmp_path_factory):
  """The flag of a config of a model with one layer, a sparse one."""
  path = tmp_path_factory.mktemp('config') / 'one_layer.py'
  path.write_text(
    'from moe_jax.configs import tiny_switch\n'
    'def get_config():\n'
    "  config = tiny_switch.get_config('runlocal')\n"
    '  config.model.num_layers = 1\n'
    "  config.model.moe.layers = 'all'\n"
    '  return config\n'
  )
  return f'--config={path}'


@pytest.mark.slow
def test_the_step_benchmark_writes_every_row(one_layer, tmp_path, monkeypatch):
  # Models that are computed anew in the backward pass are not compiled here.
  variants = dict([*bench_train_step.variants().items()][:3])
  monkeypatch.setattr(bench_train_step, 'variants', lambda: variants)
  argv = [one_layer, '--seconds=0', '--depths', '2', '--rough_peaks']
  bench_train_step.main([*argv, f'--output={tmp_path}'])
  results = results_in(tmp_path)
  assert [r['case'] for r in results['rows']] == [*variants]
  assert results['rows'][0]['per_twin'] == 1
  depths = [(r['case'], r['layers']) for r in results['compilation']]
  assert depths == [('sparse', 2), ('sparse, dropless', 2)]


@pytest.mark.slow
def test_the_overhead_benchmark_saves_once_a_burst(
  one_layer, tmp_path, monkeypatch
):
  steps = []
  save = Checkpointer.save

  def counting_save(self, step, *args, **kwargs):
    steps.append(step)
    save(self, step, *args, **kwargs)

  monkeypatch.setattr(Checkpointer, 'save', counting_save)
  bench_overhead.main(
    [
      one_layer,
      f'--config.data.source.python_stdlib.modules={tiny.MODULES}',
      *['--burst=3', '--seconds=0'],
      f'--output={tmp_path}',
    ]
  )
  # One round of bursts warms up, and five are timed.
  assert len(steps) == 6
  rows = results_in(tmp_path)['rows']
  assert [row['case'] for row in rows] == [
    *('bare loop', 'metrics', 'metrics and traces', 'metrics and checkpoint')
  ]
  assert rows[0]['per_bare'] == rows[0]['cpu_per_bare'] == 1
  assert rows[-1]['checkpoint_bytes'] > 10_000


def test_programs_of_another_process_give_their_results(tmp_path):
  file = tmp_path / 'programs.py'
  file.write_text(
    'counts = []\n'
    'def programs(first):\n'
    '  print("heard by nobody")\n'
    '  return {"count": lambda: counts.append(1) or first + len(counts),\n'
    '          "end": lambda: exit(3)}\n'
  )
  with turns(str(file), {'first': 4}) as runs:
    assert [runs['count'](), runs['count']()] == [5, 6]
    with pytest.raises(ValueError, match='has ended with status 3'):
      runs['end']()


@pytest.mark.slow
def test_a_checkout_against_itself(one_layer, tmp_path):
  here = pathlib.Path(__file__).parents[1]
  argv = [f'--against={here}', one_layer, '--seconds=0']
  bench_train_step.main([*argv, f'--output={tmp_path}'])
  rows = results_in(tmp_path)['rows']
  assert [row.get('same_losses') for row in rows] == [True, True, None]
  twin, sparse, difference = rows
  assert difference['case'] == 'sparse minus dense twin'
  assert twin['rounds'] == 5 and twin['old'] > 0 and sparse['new'] > 0


def test_capacity_serves_what_fits():
  # Each expert serves two of six choices at most, so that expert 0 drops one.
  load = np.array([3, 2, 1])
  assert moe_layer.served_share('gather', load) == 5 / 6
  assert moe_layer.served_share('dropless', load) == 1


@pytest.mark.slow
def test_a_peers_step_is_of_the_same_model(tmp_path, monkeypatch):
  pytest.importorskip('transformers')
  heads = {'num_heads': 2, 'head_width': 8}
  small = {'vocab_size': 40, 'width': 24, 'attention': heads, 'num_layers': 2}
  # transformers' model of two layers with two sparse ones has no dense one.
  moe = {**peer_steps.SIZES['model']['moe'], 'layers': 'all'}
  sizes = {
    **peer_steps.SIZES,
    'batch_size': 2,
    'data': {'seq_len': 12, 'target_len': 6},
    'model': {
      **peer_steps.SIZES['model'], **small, 'ffn': {'hidden': 20}, 'moe': moe
    },
  }  # fmt: skip
  monkeypatch.setattr(peer_steps, 'SIZES', sizes)
  # The other cases are programs of steps that other tests take.
  first = dict([*peer_steps.cases().items()][:1])
  monkeypatch.setattr(peer_steps, 'cases', lambda: first)
  # Tests of attention and generation run their peers in another process.
  monkeypatch.setattr(
    bench_train_step,
    'turns',
    lambda *arguments: contextlib.nullcontext(peer_steps.programs()),
  )
  options = train_step_programs.prepared(peer_steps.config(), {})
  peer = peer_steps.transformers_model(options)
  peer_size = sum(p.numel() for p in peer.parameters())
  shapes = models.abstract_params(options.build())
  assert peer_size == sum(leaf.size for leaf in jax.tree.leaves(shapes))
  output = ['--peer', '--seconds', '0', '--rough_peaks']
  bench_train_step.main([*output, f'--output={tmp_path}'])
  rows = results_in(tmp_path)['rows']
  assert {row['case']: row['faster'] for row in rows}['transformers'] == 1
  assert len(rows) == 2 and all(row['ms'] > 0 for row in rows)


@pytest.mark.slow
def test_attention_is_timed_beside_pytorchs(tmp_path, monkeypatch):
  pytest.importorskip('torch')
  monkeypatch.setattr(bench_attention, 'SHAPES', ((2, 70, 2, 8),))
  output = ['--peer', '--seconds', '0', '--rough_peaks']
  bench_attention.main([*output, f'--output={tmp_path}'])
  rows = results_in(tmp_path)['rows']
  names = [row['case'] for row in rows]
  assert names == ['einsum', 'blocks', 'xla', 'PyTorch'] * 2
  for row in rows:
    name = row['case'].lower()
    assert row['ms'] > 0 and row.get(f'per_{name}', 1) == 1


@pytest.mark.slow
def test_blocks_of_logits_take_less_memory(tmp_path, monkeypatch):
  monkeypatch.setattr(bench_loss, 'VOCAB_SIZES', (4096,))
  monkeypatch.setattr(
    bench_loss, 'BLOCK_MB', {'all at once': 0, 'by blocks': 1}
  )
  bench_loss.main(['--seconds', '0', '--rough_peaks', f'--output={tmp_path}'])
  whole, blocks = results_in(tmp_path)['rows']
  assert whole['logits_mb'] == 16 and blocks['difference'] < 1e-5
  assert blocks['peak_mb'] < whole['peak_mb'] / 2


@pytest.mark.slow
def test_flips_of_bfloat16_have_causes(tmp_path, monkeypatch):
  monkeypatch.setattr(bench_flips, 'FAMILIES', ('qwen3_moe',))
  monkeypatch.setattr(bench_flips, 'SHAPE', (3, 70))
  bench_flips.main([f'--output={tmp_path}'])
  free, imposed = results_in(tmp_path)['rows']
  assert free['tokens'] == imposed['tokens'] == 6 * 3 * 70
  assert free['rounding'] > 0 and imposed['after another flip'] == 0
  assert not imposed['other weights']


@pytest.mark.parametrize(('num_tokens', 'read'), [(2, 4), (8, 7)])
def test_experts_that_a_step_reads_are_those_of_random_choices(
  num_tokens, read
):
  sizes = bench_generation.SIZES
  assert bench_generation.read_experts(num_tokens, sizes) == read
  rng, K = np.random.default_rng(0), sizes['num_experts_per_tok']
  experts = np.tile(np.arange(sizes['num_local_experts']), (200, num_tokens, 1))
  choices = rng.permuted(experts, axis=-1)[..., :K]
  mean_count = np.mean([len(np.unique(draw)) for draw in choices])
  assert abs(mean_count - read) < 0.6


@pytest.mark.slow
def test_generation_is_timed_on_the_same_tokens(tmp_path, monkeypatch):
  pytest.importorskip('transformers')
  small = {
    'vocab_size': 40, 'hidden_size': 24, 'intermediate_size': 20,
    'num_attention_heads': 2, 'num_key_value_heads': 1,
    'num_local_experts': 3,
  }  # fmt: skip
  monkeypatch.setattr(
    bench_generation, 'SIZES', {**bench_generation.SIZES, **small}
  )
  bench_generation.main(
    [
      *['--batch_sizes', '3', '--seconds', '0', '--num_layers', '2'],
      *['--prompt_len', '5', '--num_tokens', '7', f'--output={tmp_path}'],
      '--rough_peaks',
    ]
  )
  rows = results_in(tmp_path)['rows']
  our_cases = [bench_generation.OURS, bench_generation.STREAMED]
  by_case = {row['case']: row for row in rows}
  assert [*by_case][:2] == our_cases and len(by_case) > 2
  limit = by_case.pop(bench_generation.LIMIT)
  assert limit['over_limit'] == 1 and 'same_tokens' not in limit
  assert all(row['same_tokens'] == 1 for row in by_case.values())
  default = by_case[[*by_case][2]]
  assert default['per_default'] == 1
  fastest = by_case[default['fastest_peer']]
  assert fastest['per_fastest'] == 1
  peers = [row for name, row in by_case.items() if name not in our_cases]
  speeds = [row['tokens_per_second'] for row in peers]
  assert fastest['tokens_per_second'] == max(speeds)


@pytest.mark.slow
def test_documents_can_be_made_again_by_their_number(tmp_path):
  training = random_reads.write(tmp_path / 'lines', 200_000)
  texts = data.FilesSource(f'{tmp_path}/lines/*.jsonl').texts()
  docs = [random_reads.document(i) for i in range(len(training))]
  for split, train in zip(data.SPLITS, (True, False)):
    expected = [t for t, is_train in zip(docs, training) if is_train == train]
    assert list(texts.texts(split)) == expected


@pytest.mark.slow
def test_both_tokenizers_are_measured(tmp_path, monkeypatch):
  monkeypatch.setattr(bench_prepare, '_BPE_DOCUMENTS', 50)
  rows = bench_prepare.measure(tmp_path, 100_000, [1], 1)
  assert [row['tokenizer'] for row in rows] == ['bytes', 'BPE']
  for row in rows:
    assert row['mb_per_second'].median > 0 and row['speed_up'].median == 1


def work(E=1, K=1, backward=False, router=False, **options):
  sizes = moe_layer.Sizes(10, 3, 7, **options)
  return sizes.work(E, K, backward=backward, router=router)


def test_a_sparse_layer_reads_every_expert_and_serves_every_choice():
  counts, products = work(5, 2), 2 * 2 * 10 * (3 * 7 + 7 * 3)
  assert counts.flops == products
  assert counts.min_bytes == 4 * (5 * 2 * 21 + 2 * 30)
  counts = work(5, 2, backward=True)
  assert counts.flops == 3 * products
  # Kernels are read twice and their gradients written once; x is read twice; y,
  # dy and dx pass once.
  assert counts.min_bytes == 4 * (3 * 210 + 5 * 30)
  # A router, a third kernel, and numbers of two bytes.
  counts = work(5, router=True, activation='swiglu', dtype='bfloat16')
  assert counts.flops == 2 * 10 * 3 * 21 + 2 * 10 * 3 * 5
  assert counts.min_bytes == 2 * (5 * 3 * 21 + 3 * 5 + 2 * 30)


@pytest.mark.parametrize(
  ('flops', 'min_bytes', 'seconds'),
  # The first is limited by products, the second by memory.
  [(300, 10, 3.0), (100, 80, 4.0)],
)
def test_the_slower_of_both_bounds(flops, min_bytes, seconds):
  peaks = roofline.Peaks(100.0, 20.0, 'float32', 512, 64)
  assert roofline.Work(flops, min_bytes).seconds(peaks) == seconds


def test_peaks_are_measured():
  peaks = roofline.measure_peaks('bfloat16', quick=True)
  assert math.isfinite(peaks.flops_per_second) and peaks.flops_per_second > 0
  assert math.isfinite(peaks.bytes_per_second) and peaks.bytes_per_second > 0


def test_peaks_of_a_round_are_of_its_own_times():
  peaks = roofline.Peaks(1.0, 1.0, 'float32', matmul_size=10, copy_bytes=600)
  seconds = {roofline.MATMUL: [2.0, 4.0], roofline.COPY: [3.0, 1.0]}
  by_round = roofline.by_round(peaks, seconds)
  assert [p.flops_per_second for p in by_round] == [1000.0, 500.0]
  assert [p.bytes_per_second for p in by_round] == [200.0, 600.0]
