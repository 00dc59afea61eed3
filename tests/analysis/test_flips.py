"""Flips have the cause that was planted, and rounding alone flips as it may."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.analysis import flips, recording, replay, traces
from moe_jax.analysis.traces import Header, LayerChoices, LayerInfo, Record
from moe_jax.data import DataOptions, tokenizers
from moe_jax.layers.routers import SparseMixer, TokenChoice, TopologyAware
from moe_jax.models.recorded import recording as recorded
from moe_jax.routing.capacity import All
from tests.models import tiny

E, K = 5, 2
# Documents of a row: one of four tokens, one of two, and padding.
DOCUMENTS = np.array([[1, 1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1, 1]])
SHAPE = DOCUMENTS.shape
LEFT_OUT = -1


def layer(logits=(), expert=(), dropped=()):
  """Choices of experts 0 and 1, whose logits are 4 and 3 of 4 to 0.

  The arguments have what is special, by (row, token).
  """
  all_logits = np.tile(np.arange(4, -1, -1, np.float32), (*SHAPE, 1))
  experts = np.where(DOCUMENTS[..., None] > 0, [0, 1], -1).astype(np.int32)
  kept = experts >= 0
  for place, values in dict(logits).items():
    all_logits[place] = values
  for place, values in dict(expert).items():
    experts[place], kept[place] = values, np.array(values) >= 0
  for place in dropped:
    kept[(*place, 1)] = False
  return LayerChoices(experts, kept.astype(np.float32), kept, all_logits)


def record(layers, /, **fields):
  ids = np.arange(DOCUMENTS.size, dtype=np.int32).reshape(SHAPE)
  whole = Record('test', 6, 3, ids, ids, DOCUMENTS, layers)
  return whole._replace(**fields)


# Root mean square of the logits: sqrt(6) = 2.45. So rounding in bfloat16 may
# change margins of 16 / 256 * 2.45 * sqrt(2) = 0.22 in layer 1, and of 0.34 in
# layer 4.
OURS = {
  1: layer(logits={(0, 1): [4, 3, 2.9, 1, 0], (0, 2): [4, 3, 3, 1, 0]}),
  4: layer(logits={(0, 3): [4, 3, 2.7, 1, 0], (1, 6): [4, 3, 2.6, 1, 0]}),
}
THEIRS = {
  1: layer(
    expert={
      (0, 0): [1, 0],  # in another order
      (0, 1): [0, 2],  # margin 0.1
      (0, 2): [2, 0],  # margin 0
      (0, 3): [0, 3],  # margin 2
      (1, 2): [LEFT_OUT, LEFT_OUT],
      (1, 3): [0, LEFT_OUT],
    },
    dropped=[(0, 4)],
  ),
  4: layer(
    expert={
      (0, 0): [0, 4],  # no token before it differs
      (0, 1): [0, 4],  # itself flipped in layer 1
      (0, 3): [2, 0],  # margin 0.3
      (0, 5): [0, 4],  # the token before had a drop in layer 1
      (1, 1): [0, 4],  # only later tokens differ
      (1, 6): [0, 2],  # margin 0.4, and a token before it is not recorded
    }
  ),
}
__, SAME, CAP, TIE, ROUND, AFTER, OTHER = range(7)
FREE = {
  1: [
    [SAME, ROUND, TIE, OTHER, CAP, SAME, __],
    [SAME, SAME, __, CAP, SAME, SAME, SAME],
  ],
  4: [
    [OTHER, AFTER, SAME, ROUND, SAME, AFTER, __],
    [SAME, OTHER, SAME, SAME, SAME, SAME, AFTER],
  ],
}
# Recorded drops were imposed, too, and nothing is the consequence of a flip.
IMPOSED = {
  1: [
    [SAME, ROUND, TIE, OTHER, SAME, SAME, __],
    [SAME, SAME, __, CAP, SAME, SAME, SAME],
  ],
  4: [
    [OTHER, OTHER, SAME, ROUND, SAME, OTHER, __],
    [SAME, OTHER, SAME, SAME, SAME, SAME, OTHER],
  ],
}


def imposed(ours, theirs):
  return {
    n: x._replace(expert=theirs[n].expert, kept=theirs[n].kept)
    for n, x in ours.items()
  }


@pytest.mark.parametrize('is_imposed', [False, True])
def test_planted_causes_are_found(is_imposed):
  ours = imposed(OURS, THEIRS) if is_imposed else OURS
  layers = flips.compare(record(THEIRS), record(ours), imposed=is_imposed)
  expected = IMPOSED if is_imposed else FREE
  for n, outcome in expected.items():
    np.testing.assert_array_equal(layers[n].outcome, outcome)
  np.testing.assert_allclose(layers[1].margin[0, :5], [0, 0.1, 0, 2, 0], 1e-5)
  np.testing.assert_allclose(layers[4].limit[1, 0], 0.3423, 1e-3)
  if not is_imposed:
    # Of 14 tokens one is padding and one not recorded.
    assert [*layers[1].counts.values()] == [12, 7, 2, 1, 1, 0, 1]
    # float32 rounds 2**16 times less.
    exact = flips.compare(record(THEIRS), record(ours), 'float32')
    assert [*exact[1].counts.values()] == [12, 7, 2, 1, 0, 0, 2]


HEADER = Header(
  {1: LayerInfo(E, K), 4: LayerInfo(E, K)}, *SHAPE, 23, has_logits=True,
  dtype='float32',
)  # fmt: skip


def rows_of(text):
  """The rows of a printed table, whose first column is the layer."""
  lines = (' '.join(line.split()) for line in text.splitlines())
  return [line for line in lines if re.fullmatch(r'\d .*%.*', line)]


def write(folder, layers, header=HEADER, **fields):
  traces.write(folder, header, [record(layers, **fields)])
  return str(folder)


def test_the_command_prints_counts_and_examples(tmp_path, capsys, monkeypatch):
  monkeypatch.delenv('COLUMNS', raising=False)
  theirs = write(tmp_path / 'theirs', THEIRS)
  flips.main([theirs, write(tmp_path / 'ours', OURS)])
  text = capsys.readouterr().out
  assert rows_of(text) == [
    '1 58.33% 12 7 2 1 1 0 1',
    '4 53.85% 13 7 0 0 1 3 2',
  ]
  assert 'layer 1, step 6, batch 3, row 0, token 1: [0 2] there, [0 1] ' in text
  assert 'here; margin 0.1 of 0.23' in text
  assert text.count(' there, ') == 2 + 1 + 2 + 2 + 2  # two of a cause at most
  ours = write(tmp_path / 'imposed', imposed(OURS, THEIRS))
  flips.main([theirs, ours, '--imposed', '--dtype=float32'])
  assert rows_of(capsys.readouterr().out)[0] == '1 66.67% 12 8 1 1 0 0 2'


GROUPS = {1: LayerInfo(E, K), 4: LayerInfo(E, K, by_logits=False)}


@pytest.mark.parametrize(
  ('changed', 'message'),
  [
    ({'has_logits': False}, 'logits=False'),
    ({'dtype': 'float16'}, 'float16'),
    ({'layers': GROUPS}, r'layers \[4\] have a bias'),
  ],
)
def test_the_command_needs_logits_that_decide(
  changed, message, tmp_path, monkeypatch
):
  monkeypatch.setenv('MOE_JAX_TRACEBACK', '1')
  header = dataclasses.replace(HEADER, **changed)
  folders = write(tmp_path / 'a', THEIRS), write(tmp_path / 'b', OURS, header)
  with pytest.raises(ValueError, match=message):
    flips.main([*folders, '--imposed'])


def test_a_trace_says_whether_logits_alone_decide():
  bias = {'balance_bias_rate': 0.1, 'balance_bias_scores': 'softmax'}
  groups = {'expert_groups': 2}
  for options, by_logits in (({}, True), (bias, False), (groups, False)):
    router = TokenChoice(gates='renormalized', **options)
    o = tiny.options({'router': router, 'num_experts': 6})
    header = recording.make_header(
      o.build(), o, DataOptions(), tokenizers.Bytes(), batch_size=4
    )
    assert [x.by_logits for x in header.layers.values()] == [by_logits] * 2
  assert SparseMixer().by_logits and not TopologyAware().by_logits


def changed(layers, n, **fields):
  return {**layers, n: layers[n]._replace(**fields)}


ONE_MORE = {(1, 5): [4, 3, 2, 1, 3.5]}
REFUSED = {
  'tokens': (
    dict(tokens=np.arange(14, dtype=np.int32).reshape(SHAPE) % 9), {}, {},
    'batch 3 of step 6, row 1, token 2: id 0 there, 9 here',
  ),
  'layers': ({'layers': {1: THEIRS[1]}}, {}, {}, r'\{1: \(2, 7, 2\)\} there'),
  'K': (
    {'layers': changed(THEIRS, 4, expert=THEIRS[4].expert[..., :1])}, {}, {},
    r'4: \(2, 7, 1\)\} there',
  ),
  'E': (
    {'layers': changed(THEIRS, 4, expert=THEIRS[4].expert + 4)}, {}, {},
    'layer 4: some experts there have no logits',
  ),
  'encoder': ({}, {'sequence': 'encoder'}, {}, "of 'encoder'"),
  'logits': ({}, {'layers': changed(OURS, 1, logits=None)}, {}, 'no logits'),
  'bias': ({}, {'layers': OURS | {4: layer(ONE_MORE)}}, {}, '4: 1 of 14'),
  'not imposed': ({}, {}, {'imposed': True}, 'layer 1: 4 of 14'),
  'dtype': ({}, {}, {'dtype': 'int8'}, "unknown dtype 'int8'; have"),
}  # fmt: skip


@pytest.mark.parametrize('name', REFUSED)
def test_what_cannot_be_compared_is_refused(name):
  there, here, options, message = REFUSED[name]
  with pytest.raises(ValueError, match=message):
    flips.compare(record(THEIRS, **there), record(OURS, **here), **options)


def test_bfloat16_flips_by_rounding_and_another_column_by_other_weights():
  moe = {'capacity': All(), 'num_experts': 7}
  layers = dict(num_layers=3, width=20)
  fine = tiny.build(moe, **layers)
  coarse = tiny.build(moe, **layers, numerics={'dtype': 'bfloat16'})
  params = tiny.params_of(fine)
  tokens = tiny.tokens(shape=(6, 50))
  positions = np.tile(np.arange(50, dtype=np.int32), (6, 1))
  batch = dict(
    tokens=tokens, positions=positions, segment_ids=np.ones_like(tokens)
  )

  def run(model, params, *records):
    inputs = model.inputs(replay.imposed(model, batch, *records))
    choices = jax.jit(
      lambda params, inputs: recorded(
        model, {'params': params}, **inputs, logits=True, dtype='float32'
      )[1]
    )(params, inputs)
    records = recording.records_of(model, 'test', 0, 0, batch, choices)
    return next(iter(records))

  def counts(theirs, ours, imposed):
    layers = flips.compare(theirs, ours, imposed=imposed)
    return [[*x.counts.values()][2:] for x in layers.values()]

  theirs = run(coarse, params)
  free = np.array(counts(theirs, run(fine, params), False))
  assert free[:, 2:4].sum() > 4 and not free[:, [0, 1, 4]].any()
  alone = np.array(counts(theirs, run(fine, params, theirs), True))
  assert alone[:, 2].sum() > 4 and not alone[:, [0, 1, 3, 4]].any()

  def other_column(path, w):
    is_router = 'router' in jax.tree_util.keystr(path)
    if not is_router:
      return w
    # Layers are stacked: the second one has another column of expert 3.
    return w.at[1, :, 3].set(jnp.asarray(tiny.draw(w.shape[1], seed=5)))

  other = jax.tree_util.tree_map_with_path(other_column, params)
  planted = np.array(counts(theirs, run(fine, other, theirs), True))
  # Gates are not imposed: layers after the second one have other inputs.
  np.testing.assert_array_equal(planted[0], alone[0])
  assert planted[1, 4] > 50
  free = np.array(counts(theirs, run(fine, other), False))
  assert free[1, 4] > 0 and free[0, 4] == 0
