"""Experts learn ids, kinds of characters, domains, languages or positions.

    python -m experiments.specialisation --preset=quick

ST-MoE (https://arxiv.org/abs/2202.08906), Tables 13 and 15: experts of an
encoder specialise in kinds of tokens, such as punctuation, verbs and numbers,
those of the decoder in nothing that was found, and experts of several languages
do not split by language. OpenMoE (https://arxiv.org/abs/2402.01739) finds that
the id of a token decides more than its domain does. These are directions: the
tables are of examples.

Here: encoder-decoders of bytes with two sparse layers in either half, 8
experts, two a token, and slots for twice the choices, on two mixtures: spans
cut out of four domains of Python's library, and texts of django's interface
translated into four languages, whose name begins the encoder's text. What a
first choice says about a label is its information in per cent of the entropy of
experts, less what shuffled labels have; sources (a domain or a language) are
shuffled by document. "Punctuation" is the entropy of all choices less that of
punctuation's. A byte is not a word: its id says less than a word's does, and
kinds of words cannot be told. All numbers are read from records of routing on
validation batches, at the end and at two checkpoints: before training and after
a fifth.

The full preset, 5 arms, was planned for 20 minutes on two idle cores with 5
seeds. These left two claims open; five more seeds were then added, on
2026-11-30, to be run with the others anew. The runs of all ten took 41 core
minutes. The claims were written before any run.
"""

import string
from collections.abc import Sequence

import ml_collections
import numpy as np

from experiments.study import (
  byte_models,
  command,
  domains,
  finetuned,
  parts,
  validation_routing,
)
from experiments.study.parts import Arm, Claim, Column, Figure, Preset, Row
from experiments.study.runner import TrainingRunner
from experiments.study.study import Study
from experiments.study.tasks import Task
from experiments.study.validation_routing import (
  HALVES,
  layers_by_half,
  named,
  row_at,
)
from moe_jax.analysis import routing_measures
from moe_jax.analysis.recording import header_of
from moe_jax.analysis.traces import Header, Record
from moe_jax.shapes import Int
from moe_jax.training.setup import Run
from moe_jax.training.step import TrainState

# Checkpoints that are measured besides the last, in % of the run.
EARLY = (0, 20)
PUNCTUATION = tuple(string.punctuation.encode())
# Bytes by the kind of character; all other ids are a kind of their own.
KINDS = (
  tuple(string.ascii_letters.encode()),
  tuple(string.digits.encode()),
  tuple(string.whitespace.encode()),
  PUNCTUATION,
  tuple(range(128, 256)),
)
# Number of batches of each source, at the end and at earlier checkpoints.
_BATCHES, _EARLY_BATCHES = 10, 4
DOMAINS, LANGUAGES = 'domains', 'languages'
FREE, RANDOM = 'no balance loss', 'random experts'
LAYERS = 2
# Rows of what is learned in two parts of the run.
FIFTH, REST = (
  f'{DOMAINS}, encoder, learned in {part}'
  for part in ('the first fifth', 'the rest')
)
CODES = ('de', 'es', 'fr', 'ru')
# Sources of the mixtures as text, which arms can exchange.
LINES = {
  DOMAINS: ', '.join(
    f"{name}:python_stdlib('{modules}')*1"
    for name, modules in domains.DOMAINS.items()
  ),
  LANGUAGES: ', '.join(f'{code}:django_gettext({code})*1' for code in CODES),
}


def config(steps: int) -> ml_collections.ConfigDict:
  """The config of the arms on domains; its mixture is written as text."""
  config = byte_models.decoder(steps, num_layers=LAYERS, num_selected=2)
  config.batch_size = 16
  config.data.task.kind = 'span_corruption'
  config.data.seq_len, config.data.target_len = 128, 32
  config.data.mixture.lines = LINES[DOMAINS]
  config.data.mixture.rule = 'given'
  m = config.model
  m.kind = 'encoder_decoder'
  m.positions.kind = 'relative'
  m.moe.expert.hidden = 128
  m.moe.layer_reduce = 'mean'
  m.moe.router.token_choice.gates = 'renormalized'
  m.moe.capacity.per_assignment.factor = 2.0
  # Rounded up, as one checkpoint more would push the first one out.
  config.checkpoint.every_steps = -(-steps // 5)
  config.checkpoint.keep_newest = 5
  return config


def arms(_: Preset) -> list[Arm]:
  """Both mixtures with and without a balance loss, and one control."""
  translated = {
    'data.mixture.lines': LINES[LANGUAGES],
    'data.task.kind': 'seq2seq',
    'data.seq_len': 64,
    'data.target_len': 64,
  }
  free = {'model.moe.router.token_choice.balance_weight': 0.0}
  return [
    Arm(DOMAINS, {}),
    Arm(f'{DOMAINS}, {FREE}', free),
    Arm(f'{DOMAINS}, {RANDOM}', {'model.moe.router.kind': 'random'}),
    Arm(LANGUAGES, translated),
    Arm(f'{LANGUAGES}, {FREE}', {**translated, **free}),
  ]


TOKEN, KIND, PLACE = 'token id', 'kind of character', 'position'
SOURCE, MARKS = 'domain or language', 'punctuation'
LESS = f'token id less {SOURCE}'
MEASURED = {
  TOKEN: 'token',
  KIND: 'kind',
  PLACE: 'position',
  SOURCE: 'source',
  LESS: 'token_less_source',
}
COLUMNS = [
  byte_models.TOKEN_LOSS,
  *(
    parts.percent(name, f'routing/*/{key}', bounds=parts.ANY)
    for name, key in MEASURED.items()
  ),
  Column(MARKS, 'routing/*/punctuation', 'nats', 2),
]


def layer_key(
  half: str, layer: int | str = '*', share: int | None = None
) -> str:
  """The key of measured layers: a half, a layer from 1, a share of the run.

  Args:
    half: One of `HALVES`.
    layer: Number of the layer in its half; '*' stands for all.
    share: Share of the run in %; None is its end.
  """
  before = '' if share is None else f'at_{share}/'
  return f'{before}{half}_{layer}'


def measure(run: Run, state: TrainState) -> dict[str, float]:
  """Measures a run at its end, and at early checkpoints.

  Returns:
    Numbers by name, `routing/<layer key>/<what>`; see `layer_key` and
    `layer_information`.
  """
  model = validation_routing.evaluated_model(run, byte_models.EVAL)
  header, last = header_of(run), int(state.step)
  states = dict(validation_routing.states(run, state))
  chosen = {
    share: min(states, key=lambda step: abs(100 * step / last - share))
    for share in EARLY
  }
  measures = {}
  for share, step in {**chosen, None: last}.items():
    batches = _BATCHES if share is None else _EARLY_BATCHES
    records = validation_routing.records(
      model,
      states[step],
      validation_routing.batches(run, batches),
      step=step,
      seed=run.options.seed,
    )
    by_layer = layer_information(header, [*records])
    measures |= {
      layer_key(*name.split('_'), share): by_layer[layer]
      for name, layer in layers_by_half(header).items()
    }
  return named(measures)


def layer_information(
  header: Header, records: Sequence[Record]
) -> dict[int, dict[str, float]]:
  """Information of first choices about tokens, by layer.

  Returns:
    For each layer, by name:
    - token, kind, position, source: information of the expert about the id of
      the token, the kind of character, the place in the document, and the
      source of the text, as a share of the entropy of experts, less that of
      shuffled labels; token_less_source is a difference of them.
    - punctuation: entropy of the choices of all tokens less that of punctuation
      in nats; above 0 if punctuation goes to fewer experts.
  """
  layers = routing_measures.layers_of(header, records)
  labels = {
    'token': routing_measures.TOKEN,
    'position': routing_measures.POSITION,
    'source': routing_measures.SOURCE,
  }
  by_label = routing_measures.specialisation(layers)
  by_layer = {}
  for number, layer in layers.items():
    table = layer.by_token
    measures = {
      name: by_label[label][number].fraction
      for name, label in labels.items()
      if number in by_label.get(label, ())
    }
    kinds = routing_measures.information(
      by_kind(table), np.random.default_rng(number)
    )
    marks = routing_measures.entropy(table[[*PUNCTUATION]].sum(0))
    measures |= {
      'kind': kinds.fraction,
      'punctuation': routing_measures.entropy(table.sum(0)) - marks,
    }
    if 'source' in measures:
      measures['token_less_source'] = measures['token'] - measures['source']
    by_layer[number] = measures
  return by_layer


def by_kind(table: Int[np.ndarray, 'V E']) -> Int[np.ndarray, 'kinds E']:
  """First choices by the kind of character; the last row is of other ids."""
  of_kinds = [table[[*ids]].sum(0) for ids in KINDS]
  rest = table.sum(0) - sum(of_kinds)
  return np.stack([*of_kinds, rest]).astype(np.int64)


def row(
  arm: str, half: str, layer: int | str = '*', share: int | None = None
) -> str:
  """Name of the row of a half, one of its layers, or a share of the run."""
  name = f'{arm}, {half}' + (f' {layer}' if layer != '*' else '')
  return name + (f', at {share} %' if share is not None else '')


def rows(results: parts.Results) -> list[Row]:
  """Halves of each arm, and layers and early checkpoints of the usual ones."""
  cells = [(arm, half, '*', None) for arm in results for half in HALVES]
  for arm in (DOMAINS, LANGUAGES):
    for half in HALVES:
      cells += [(arm, half, i + 1, None) for i in range(LAYERS)]
      cells += [(arm, half, '*', share) for share in EARLY]
  by_cell = {
    (name := row(*cell)): row_at(
      name,
      results[cell[0]],
      # The loss is that of the whole model at its end.
      COLUMNS[cell[2:] != ('*', None) :],
      layer_key(*cell[1:]),
    )
    for cell in cells
  }
  ends = by_cell[row(DOMAINS, 'encoder')]
  none, fifth = (
    by_cell[row(DOMAINS, 'encoder', '*', share)] for share in EARLY
  )
  learned = (
    finetuned.minus(FIFTH, fifth, none),
    finetuned.minus(REST, ends, fifth),
  )
  return [*by_cell.values(), *learned]


def claims() -> list[Claim]:
  """Directions of both papers, and claims on the control."""
  encoder, decoder = (row(DOMAINS, half) for half in HALVES)
  paper_note = 'The paper has examples of tokens, no measure.'
  return [
    *(
      Claim(
        f'the id of a token decides more than its {label}, {half}',
        f'{LESS}: {row(arm, half)} > 0',
      )
      for arm, label in ((DOMAINS, 'domain'), (LANGUAGES, 'language'))
      for half in HALVES
    ),
    Claim(
      'choices follow token ids more in the encoder than in the decoder',
      f'{TOKEN}: {encoder} > {decoder}',
      note=paper_note,
    ),
    Claim(
      'choices follow kinds of characters more in the encoder',
      f'{KIND}: {encoder} > {decoder}',
      note=paper_note,
    ),
    Claim(
      'punctuation goes to fewer experts than all tokens do, encoder',
      f'{MARKS}: {encoder} > 0',
      note=paper_note,
      changes=[
        parts.more_seeds(
          'Not resolved with five seeds (0.27 ± 0.27)', 'ten', '2026-11-30'
        )
      ],
    ),
    Claim(
      'token ids decide less in the last layer of the encoder than in the '
      'first',
      f'{TOKEN}: {row(DOMAINS, "encoder", LAYERS)} < '
      f'{row(DOMAINS, "encoder", 1)}',
      note='Later layers see more of the context.',
    ),
    Claim(
      'what the encoder says about domains is learned',
      f'{SOURCE}: {encoder} > {row(DOMAINS, "encoder", "*", 0)}',
    ),
    Claim(
      'a balance loss holds experts back from domains, encoder',
      f'{SOURCE}: {encoder} < {row(f"{DOMAINS}, {FREE}", "encoder")}',
    ),
    Claim(
      'what choices say about ids is learned early, encoder',
      f'{TOKEN}: {FIFTH} > {REST}',
      note=(
        '"Early" means more in the first fifth of the run than in all the rest.'
      ),
    ),
    *(
      Claim(
        f'control: random experts say nothing about the {column}',
        f'{column}: {row(f"{DOMAINS}, {RANDOM}", "encoder")} = 0 within 0.5',
        note='Shuffled labels are taken off; the bound is that of '
        '`openmoe_routing`.',
      )
      for column in (TOKEN, SOURCE)
    ),
  ]


STUDY = Study(
  name='specialisation',
  title='What experts specialise in',
  source='ST-MoE, Tables 13 and 15, and OpenMoE (directions alone)',
  config=config,
  arms=arms,
  rows=rows,
  presets={
    'quick': parts.trial(150, 3),
    'full': Preset(450, 10),
  },
  columns=COLUMNS,
  claims=claims(),
  figure=Figure(
    [TOKEN, KIND, PLACE, SOURCE, MARKS],
    without=['*, at *', '*, learned in *', '*coder [0-9]'],
  ),
  runner=TrainingRunner(measure),
  remarks=(
    'Rows of a half are means over its two layers. Losses of the two '
    'mixtures are of different tasks. Random experts are drawn anew for '
    'each batch. Rows at 0 % are of the parameters before training.'
  ),
  tasks={
    'mixtures': Task(
      {},
      "four parts of the Python standard library, and django's interface in "
      'four languages, bytes',
    )
  },
  written='2026-11-29',
)
get_config, get_items = STUDY.get_config, STUDY.get_items

if __name__ == '__main__':
  command.main(STUDY)
