"""Servers' experts become records, and come back as the servers write them.

The fixtures are made by hand: a model of three layers, of which the first is
dense, as DeepSeek's, with E=5 and K=2, and a prompt of three tokens with an
answer of two, whose last token no server has read.
"""

import base64
import struct

import jax
import numpy as np
import pytest

from moe_jax import generate, generation
from moe_jax.analysis import replay, traces
from moe_jax.analysis.recording import records_of
from moe_jax.generation import read_again
from moe_jax.interop import rollouts
from moe_jax.layers.routers import TokenChoice
from moe_jax.models.recorded import recording
from moe_jax.routing.capacity import All, Fixed
from tests import test_readme
from tests.generation import folders
from tests.models import tiny

MODEL = tiny.build({'layers': '1,2', 'capacity': All()}, num_layers=3)
PROMPT, ANSWER = [7, 3, 9], [4, 11]
TOKENS = PROMPT + ANSWER
# The experts of each token that was read, in layers 1 and 2.
ROWS = [
  [[0, 3], [4, 1]],
  [[2, 1], [0, 2]],
  [[3, 4], [1, 0]],
  [[1, 0], [2, 3]],
]
# The record has, by layer, these experts, and -2 for the last token.
LAYERS = {
  1: [[0, 3], [2, 1], [3, 4], [1, 0], [-2, -2]],
  2: [[4, 1], [0, 2], [1, 0], [2, 3], [-2, -2]],
}
# SGLang 0.5.11: all three layers, with zeros in the dense one.
SGLANG_FLAT = [
  *(0, 0, 0, 3, 4, 1),
  *(0, 0, 2, 1, 0, 2),
  *(0, 0, 3, 4, 1, 0),
  *(0, 0, 1, 0, 2, 3),
]
SGLANG = base64.b64encode(struct.pack('<24i', *SGLANG_FLAT)).decode()
# tunix, in the order of a note on its sampler: padding in front of a row.
TUNIX = [
  [
    [[9, 9], [0, 3], [2, 1], [3, 4], [1, 0], [0, 0]],
    [[9, 9], [4, 1], [0, 2], [1, 0], [2, 3], [0, 0]],
  ]
]
READ = {
  'SGLang 0.5.11': lambda: rollouts.read_sglang(MODEL, TOKENS, SGLANG),
  # A response's JSON: lists, and no row for the last token.
  'vLLM 0.21': lambda: rollouts.read_vllm(PROMPT, ANSWER, ROWS[:3], ROWS[3:]),
  'tunix, inferred': lambda: rollouts.read_tunix(
    [[0, *TOKENS]], [[0, 1, 1, 1, 1, 1]], TUNIX
  )[0],
  'tpu-inference, plain': lambda: rollouts.read_numpy(TOKENS, np.int32(ROWS)),
}


def batch_of(tokens, documents=None):
  """A batch of rows of tokens, by default of one document each."""
  tokens = np.array(tokens, np.int32)
  documents = np.ones_like(tokens) if documents is None else np.array(documents)
  positions = np.zeros_like(tokens)
  for row, numbers in enumerate(documents):
    for number in {*numbers} - {0}:
      at = numbers == number
      positions[row, at] = np.arange(at.sum())
  return dict(tokens=tokens, segment_ids=documents, positions=positions)


@pytest.mark.parametrize('server', READ)
def test_a_servers_experts_become_a_record(server):
  record = rollouts.to_record(MODEL, batch_of([TOKENS]), [READ[server]()])
  assert [*record.layers] == [1, 2]
  for layer, expert in LAYERS.items():
    np.testing.assert_array_equal(record.layers[layer].expert, [expert])
    kept = record.layers[layer].kept
    np.testing.assert_array_equal(kept, np.array([expert]) >= 0)


def test_writers_give_what_servers_give(tmp_path):
  """From a record that was written by hand; no reader takes part."""
  own = batch_of([TOKENS[:4]])
  choices = {
    layer: traces.LayerChoices(
      np.array([expert[:4]]), np.full((1, 4, 2), 0.5), np.ones((1, 4, 2), bool)
    )
    for layer, expert in LAYERS.items()
  }
  (record,) = records_of(MODEL, 'generate', 0, 0, own, choices)
  (rollout,) = rollouts.from_record(MODEL, record, [TOKENS])
  assert rollouts.write_sglang(MODEL, rollout) == SGLANG
  for part, rows in zip(rollouts.write_vllm(rollout, 3), (ROWS[:3], ROWS[3:])):
    assert part.dtype == np.int16
    np.testing.assert_array_equal(part, rows)
  short = rollouts.Rollout(rollout.tokens[:2], rollout.expert[:2])
  tokens, mask, experts = rollouts.write_tunix([short, rollout])
  np.testing.assert_array_equal(tokens, [[7, 3, 0, 0, 0], TOKENS])
  np.testing.assert_array_equal(mask.sum(1), [2, 5])
  np.testing.assert_array_equal(experts[1:, :, :4], np.array(TUNIX)[:, :, 1:5])
  assert (experts[0, :, 2:] == -1).all() and (experts[1, :, 4] == -1).all()
  rollouts.save(tmp_path / 'new' / 'text.npz', [short, rollout])
  arrays = np.load(tmp_path / 'new' / 'text.npz')
  np.testing.assert_array_equal(arrays['experts_0'], ROWS[:1])
  np.testing.assert_array_equal(arrays['experts_1'], ROWS)
  loaded = rollouts.load(tmp_path / 'new' / 'text.npz')
  np.testing.assert_array_equal(loaded[1].tokens, TOKENS)


def test_rows_that_were_not_sent_are_left_to_the_router():
  """An earlier turn's rows, vLLM's -1 for a cached prefix, and a caller's."""
  text = base64.b64encode(struct.pack('<12i', *SGLANG_FLAT[12:])).decode()
  later = rollouts.read_sglang(MODEL, TOKENS, text, start=2)
  cached = np.array(ROWS, np.int16)
  cached[:2] = -1
  vllm = rollouts.read_vllm(PROMPT, ANSWER, cached[:3], cached[3:])
  for rollout in (later, vllm):
    record = rollouts.to_record(MODEL, batch_of([TOKENS]), [rollout])
    for layer, expert in LAYERS.items():
      expected = [[-2, -2], [-2, -2], *expert[2:]]
      np.testing.assert_array_equal(record.layers[layer].expert, [expected])


def test_documents_of_packed_and_padded_rows_get_their_own_rows():
  """Inputs lack the last token of a rollout, and padding stands anywhere."""
  first = rollouts.read_numpy(TOKENS, ROWS)
  second = rollouts.read_numpy([5, 6, 8], ROWS[2:])
  batch = batch_of(
    [[7, 3, 9, 4, 5, 6], [0, 0, 5, 6, 8, 0]],
    [[1, 1, 1, 1, 2, 2], [0, 0, 1, 1, 1, 0]],
  )
  record = rollouts.to_record(MODEL, batch, [first, second, second])
  a, b, c, d = LAYERS[2][:4]
  none, router = [-1, -1], [-2, -2]
  expected = [[a, b, c, d, c, d], [none, none, c, d, router, none]]
  np.testing.assert_array_equal(record.layers[2].expert, expected)
  kept = record.layers[2].kept
  np.testing.assert_array_equal(kept, np.array(expected) >= 0)
  np.testing.assert_array_equal(record.positions, batch['positions'])
  whole, *_ = rollouts.from_record(MODEL, record)
  np.testing.assert_array_equal(whole.expert, ROWS)


def changed(token, layer, experts):
  rows = np.array(ROWS)
  rows[token, layer] = experts
  return rows


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (lambda: [7, 3, 8, 4, 11], 'row 0, position 3: token 9 here, 8 there'),
    (lambda: TOKENS[:4], 'row 0, position 5: token 11 here, the end of its'),
    (lambda: changed(2, 1, [1, 5]), r'position 3, layer 2: experts \[1, 5\]'),
    (lambda: changed(1, 0, [2, 2]), r'position 2, layer 1: experts \[2, 2\]'),
    (lambda: changed(1, 0, [2, -1]), r'position 2, layer 1: experts \[2, -1\]'),
    (lambda: np.array(ROWS)[..., :1], '2 layers and 1 choices; .* 2 choices'),
    (lambda: np.zeros((4, 4, 2), int), r'4 layers .* layers \(1, 2\) of 3'),
  ],
)
def test_what_does_not_fit_is_refused_with_its_position(make, message):
  """Position 0 of the row is padding."""
  value = make()
  tokens, rows = (value, ROWS) if np.ndim(value) == 1 else (TOKENS, value)
  rollout = rollouts.read_numpy(tokens, rows[: len(tokens)])
  batch = batch_of([[0, *TOKENS]], [[0, 1, 1, 1, 1, 1]])
  with pytest.raises(ValueError, match=message):
    rollouts.to_record(MODEL, batch, [rollout])


@pytest.mark.parametrize(
  ('read', 'message'),
  [
    (lambda: rollouts.read_numpy(TOKENS, ROWS[:3]), '3 rows .* of 5 tokens'),
    (lambda: rollouts.read_numpy(TOKENS, ROWS, 2), 'from token 2 on, of 5'),
    (lambda: rollouts.read_numpy(TOKENS, np.float32(ROWS)), 'type float32'),
    (
      lambda: rollouts.read_sglang(MODEL, TOKENS, SGLANG[:-16]),
      '21 experts are no rows of L=3 times K=2',
    ),
    (lambda: rollouts.read_sglang(MODEL, TOKENS, '?'), 'no base64'),
    (
      lambda: rollouts.read_vllm(PROMPT, ANSWER, ROWS[:2], ROWS[2:]),
      r'shape \(2, 2, 2\) for 3 tokens',
    ),
    (lambda: rollouts.read_vllm(PROMPT, ANSWER, None, ROWS), r'shape \(\) for'),
    (
      lambda: rollouts.read_tunix([TOKENS], [[1] * 5], [ROWS]),
      r'\(1, 4, 2, 2\) for tokens of shape \(1, 5\)',
    ),
  ],
)
def test_rows_of_other_tokens_or_layers_are_refused(read, message):
  with pytest.raises(ValueError, match=message):
    read()


def test_models_and_records_that_no_server_has_are_refused():
  rollout, batch = rollouts.read_numpy(TOKENS, ROWS), batch_of([TOKENS])
  encoder_decoder = tiny.build(kind='encoder_decoder')
  with pytest.raises(ValueError, match='rollouts are of decoders'):
    rollouts.to_record(encoder_decoder, batch, [rollout])
  with pytest.raises(ValueError, match='1 rollouts for 2 documents'):
    rollouts.to_record(MODEL, batch_of([TOKENS, TOKENS]), [rollout])
  record = rollouts.to_record(MODEL, batch, [rollout])
  with pytest.raises(ValueError, match='position 1: token 3 here, 7 there'):
    rollouts.from_record(MODEL, record, [[7, 7, 9, 4, 11]])
  record.layers[2].kept[0, 3, 1] = False
  with pytest.raises(ValueError, match='row 0, position 3, layer 2: a choice'):
    rollouts.from_record(MODEL, record)


def choices_of(model, params, batch):
  """The record of a pass, in which `batch` may impose choices."""
  run = jax.jit(lambda batch: recording(model, params, **model.inputs(batch)))
  (record,) = records_of(model, 'a', 0, 0, batch, jax.device_get(run(batch)[1]))
  return record


def test_what_was_generated_is_replayed_through_every_format():
  """Another model's routers would choose otherwise; the last token is theirs.

  Before layer 1 there is no other mixture, so that its router sees the same
  whether or not earlier tokens' experts are imposed.
  """
  prompts = [[7, 3, 9], [5]]
  first = {'params': tiny.params_of(MODEL, 0)}
  decoder, variables = generation.prepare(MODEL, first, batch_size=2)
  answers = generation.generate(decoder, variables, prompts, num_tokens=6).rows
  read = read_again.choices(decoder, variables, prompts, answers, recording)
  (record,) = records_of(decoder, 'generate', 0, 0, *read)
  texts = [np.append(*pair) for pair in zip(prompts, answers)]
  server = rollouts.from_record(decoder, record, texts)
  forms = [
    [
      rollouts.read_sglang(MODEL, ids, rollouts.write_sglang(MODEL, row))
      for ids, row in zip(texts, server)
    ],
    [
      rollouts.read_vllm(p, a, *rollouts.write_vllm(row, len(p)))
      for p, a, row in zip(prompts, answers, server)
    ],
    rollouts.read_tunix(*rollouts.write_tunix(server)),
  ]
  batch = batch_of([texts[0], [*texts[1], 0, 0]], [[1] * 9, [1] * 7 + [0] * 2])
  second = {'params': tiny.params_of(MODEL, 1)}
  own = choices_of(MODEL, second, replay.imposed(MODEL, batch)).layers
  for rows in forms:
    imposed = rollouts.to_record(MODEL, batch, rows)
    made = choices_of(MODEL, second, replay.imposed(MODEL, batch, imposed))
    for layer in (1, 2):
      chosen = made.layers[layer].expert
      # The record of the generation has padding in front.
      for row, length in enumerate((8, 6)):
        real = record.documents[row] > 0
        expected = record.layers[layer].expert[row, real]
        np.testing.assert_array_equal(chosen[row, :length], expected)
      assert (chosen[0, :8] != own[layer].expert[0, :8]).any()
      assert made.layers[layer].kept[batch['segment_ids'] > 0].all()
    for row, last in enumerate((8, 6)):
      expert = made.layers[1].expert[row, last]
      np.testing.assert_array_equal(expert, own[1].expert[row, last])


def test_an_open_token_queues_in_its_place_where_experts_are_full():
  """Its choice takes a slot, so that a later served choice can lose its own."""
  router = TokenChoice(gates='raw')
  moe = dict(num_selected=1, layers='1', capacity=Fixed(2), router=router)
  model = tiny.build(moe)
  params = {'params': tiny.params_of(model)}
  batch = batch_of([TOKENS])
  own = choices_of(model, params, replay.imposed(model, batch)).layers[1]
  mine = int(own.expert[0, 1, 0])  # what the router chooses for token 1
  other = (mine + 1) % 5
  for token_1, kept in ((other, [1, 1, 1]), (-1, [1, 1, 0])):
    rows = [[[mine]], [[token_1]], [[mine]], [[other]], [[other]]]
    rollout = rollouts.read_numpy(TOKENS, rows)
    record = rollouts.to_record(model, batch, [rollout])
    made = choices_of(model, params, replay.imposed(model, batch, record))
    layer = made.layers[1]
    expected = [mine, other if token_1 == other else mine, mine]
    np.testing.assert_array_equal(layer.expert[0, :3, 0], expected)
    np.testing.assert_array_equal(layer.kept[0, :3, 0], kept)


def test_the_command_writes_a_file_that_readers_read(tmp_path, capsys):
  run = tmp_path / 'run'
  folders.write(run)
  file, trace = tmp_path / 'new' / 'text.npz', tmp_path / 'trace'
  flags = [f'--workdir={run}', '--num_tokens=4', f'--rollouts={file}']
  generate.main([*flags, '--prompt=def', f'--trace={trace}'])
  arrays = np.load(file)
  assert bytes(arrays['tokens_0'][:3].tolist()) == b'def'
  (record,) = traces.read(trace).records()
  real = record.documents > 0
  np.testing.assert_array_equal(record.tokens[real], arrays['tokens_0'][:-1])
  layers = [layer.expert[real] for layer in record.layers.values()]
  np.testing.assert_array_equal(arrays['experts_0'], np.stack(layers, 1))
  capsys.readouterr()
  with pytest.raises(SystemExit):
    generate.main([*flags, '--prompt=a'])
  output = capsys.readouterr()
  assert 'exists already' in output.err and not output.out


@pytest.mark.slow
def test_a_servers_output_trains_in_fifteen_lines_of_the_readme(tmp_path):
  blocks = test_readme.blocks('moe_jax/interop/README.md')
  (code,) = (text for text in blocks if 'read_vllm' in text)
  assert len([line for line in code.splitlines() if line.strip()]) <= 15
  source = test_readme.checkpoint(tmp_path, test_readme.mixtral(11))
  scope = {'source': source}
  exec(code, scope)
  before = scope['loss'](scope['variables']['params'])
  assert scope['loss'](scope['params']) < before
  # The step is that of the server's experts, not of the routers' own.
  model, params = scope['model'], {'params': scope['params']}
  made = choices_of(model, params, scope['batch'])
  free = replay.imposed(model, scope['batch'])
  for layer, choices in choices_of(model, params, free).layers.items():
    np.testing.assert_array_equal(made.layers[layer].expert, [[[0, 3]] * 4])
    assert (choices.expert != made.layers[layer].expert).any()
