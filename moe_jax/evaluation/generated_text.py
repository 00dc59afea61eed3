"""The kind 'generate': outputs for validation inputs, scored by targets.

Not here: the scores (`scores.py`), and how text is generated
(`moe_jax.generation`).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from moe_jax import data, generation
from moe_jax.config import to_dataclass
from moe_jax.distributed import is_first
from moe_jax.evaluation.prompts import without_end
from moe_jax.evaluation.scores import Score, make_scores
from moe_jax.generation import trained_run
from moe_jax.models import check_generates
from moe_jax.runs import workdir as workdir_lib
from moe_jax.runs.metrics import Row
from moe_jax.shapes import Int
from moe_jax.training.evaluate import Setting, Variables

TASKS = ('prefix_lm', 'seq2seq')


@dataclasses.dataclass(frozen=True)
class GenerateOptions:
  """The keys of an entry of kind 'generate'.

  Attributes:
    num_examples: Validation pairs, spread over the split; 0: all.
    max_new_tokens: At which an output ends. Learned positions may have room for
      fewer.
    num_beams: 1 takes the likeliest token each time.
    length_penalty: Of beam search; see `generation.beam_search`.
    metrics: By commas: bleu, chrf, rouge_l, exact_match.
    bleu_tokenizer: sacrebleu's name of it: 13a, intl, zh, char, none.
  """

  num_examples: int
  max_new_tokens: int
  num_beams: int
  length_penalty: float
  metrics: str
  bleu_tokenizer: str

  def __post_init__(self):
    if self.num_examples < 0:
      raise ValueError(f'num_examples={self.num_examples} must not be negative')
    for name in ('max_new_tokens', 'num_beams'):
      if getattr(self, name) < 1:
        raise ValueError(f'{name}={getattr(self, name)} must be at least 1')


class Pair(NamedTuple):
  """What is given and what is wanted.

  Attributes:
    ids: int32 [N], the inputs as the model reads them, cut as in training.
    inputs: Their text.
    target: The whole text that is wanted.
  """

  ids: Int[np.ndarray, ' N']
  inputs: str
  target: str


def make(setting: Setting) -> 'Generate':
  """What measures the entry; all pairs are read now.

  Raises:
    ValueError: A key is unknown, missing or out of range; the data has no
      pairs; there is no room for new tokens, or the model does not decode.
  """
  options = to_dataclass(GenerateOptions, setting.options)
  scores = make_scores(options.metrics, options.bleu_tokenizer)
  model, tokenizer = setting.model, setting.dataset.tokenizer
  check_generates(model)
  arguments = trained_run.special_ids(model, tokenizer)
  forced = arguments.get('forced_ids', ())
  if options.max_new_tokens <= len(forced):
    raise ValueError(
      f'max_new_tokens={options.max_new_tokens} leaves none to choose after '
      f'{len(forced)} that the tokenizer forces'
    )
  pairs, fitted = [], []
  for pair in validation_pairs(setting, options):
    ids, num_tokens = trained_run.fit(model, pair.ids, options.max_new_tokens)
    pairs.append(pair._replace(ids=ids))
    fitted.append(num_tokens)
  arguments |= dict(
    max_new_tokens=min(fitted),
    num_beams=options.num_beams,
    length_penalty=options.length_penalty,
  )
  return Generate(setting, scores, pairs, arguments)


def validation_pairs(setting: Setting, options: GenerateOptions) -> list[Pair]:
  """The pairs to be answered: texts as they came, or windows split in two.

  Raises:
    ValueError: The task has no inputs and targets.
  """
  task = setting.config.data.task
  rows = setting.dataset.splits['validation']
  if task not in TASKS:
    raise ValueError(
      f"kind='generate' needs inputs and targets: data.task={task!r} is none "
      f'of {list(TASKS)}'
    )
  if task == 'seq2seq':
    return _of_texts(setting, options, rows)
  places = data.spread(len(rows), options.num_examples)
  return [_of_window(setting.dataset.tokenizer, rows, i) for i in places]


def _of_texts(setting, options, rows) -> list[Pair]:
  config, tokenizer = setting.config, setting.dataset.tokenizer
  imported = trained_run.is_imported(setting.workdir)
  total = setting.dataset.counts['validation']['pairs']
  places = set(data.spread(total, options.num_examples))
  data_config = to_dataclass(data.DataConfig, config.data)
  pairs = []
  for i, texts in enumerate(data.read_pairs(data_config, 'validation')):
    if i in places:
      inputs, target = texts
      ids = trained_run.encode(config, tokenizer, inputs, imported=imported)
      lengths = np.array([len(ids)]), np.array([options.max_new_tokens])
      most = int(rows.layout.cut(*lengths).inputs[0])
      ids = without_end(ids, most, tokenizer.eos_id)
      pairs.append(Pair(ids, inputs, target))
  return pairs


def _of_window(tokenizer, rows: data.ExampleRows, row: int) -> Pair:
  """The first example of a row, split as it is whenever it is evaluated."""
  generator = np.random.default_rng([0, 0, row])
  example = rows.example(rows.members(row)[0], generator)
  inputs, target = (trained_run.decode(tokenizer, side) for side in example)
  return Pair(example.inputs, inputs, target)


@dataclasses.dataclass(frozen=True, eq=False)
class Generate:
  """Measures how near outputs are to targets.

  Attributes:
    setting: Of the entry.
    scores: By name.
    pairs: What is to be answered.
    arguments: Of `generation.generate`.
  """

  setting: Setting
  scores: Mapping[str, Score]
  pairs: list[Pair]
  arguments: dict[str, Any]

  def __call__(self, variables: Variables, step: int) -> Row:
    """The scores in percent, and how many `examples` they are of.

    Inputs, outputs and targets are left in `<name>_examples.txt`.
    """
    outputs = self.outputs(variables)
    targets = [pair.target for pair in self.pairs]
    row = {
      name: float(score.compute(outputs, targets))
      for name, score in self.scores.items()
    }
    if is_first():
      self._write(step, row, outputs)
    return {**row, 'examples': len(outputs)}

  def outputs(self, variables: Variables) -> list[str]:
    """The text for each pair."""
    config, tokenizer = self.setting.config, self.setting.dataset.tokenizer
    model, variables = generation.prepare(
      self.setting.model,
      variables,
      window=trained_run.window(
        config,
        self.setting.model,
        imported=trained_run.is_imported(self.setting.workdir),
      ),
    )
    prompts = [pair.ids for pair in self.pairs]
    size = min(config.batch_size, len(prompts))
    texts = []
    for begin in range(0, len(prompts), size):
      # A batch of another size would be another program: the last is filled.
      batch = prompts[begin : begin + size]
      filled = batch + prompts[: size - len(batch)]
      made = generation.generate(model, variables, filled, **self.arguments)
      taken = made.rows[: len(batch)]
      texts += [trained_run.decode(tokenizer, row) for row in taken]
    return texts

  def _write(self, step: int, row: Row, outputs: list[str]) -> None:
    lines = [f'step {step}, {len(outputs)} validation pairs']
    for name, score in self.scores.items():
      lines.append(f'{name} {row[name]:.2f} ({score.signature()})')
    texts = ['\n'.join(lines)]
    for pair, output in zip(self.pairs, outputs):
      texts.append(
        f'inputs: {pair.inputs}\noutputs: {output}\ntargets: {pair.target}'
      )
    path = self.setting.workdir / f'{self.setting.name}_examples.txt'
    workdir_lib.write_text(path, '\n\n'.join(texts) + '\n')
