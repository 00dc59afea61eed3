"""The kind of evaluation 'generate': outputs compared with their targets."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Self

import numpy as np

from moe_jax import data, generation
from moe_jax.config import option, unknown_text
from moe_jax.data.mixing import TaskRows
from moe_jax.data.tokenizers import Tokenizer
from moe_jax.devices import is_first
from moe_jax.errors import InputError
from moe_jax.evaluation.prompts import asker_of
from moe_jax.evaluation.scores import METRICS, Score, make_scores, names_of
from moe_jax.generation import trained_run
from moe_jax.models import check_generates
from moe_jax.runs import workdir as workdir_lib
from moe_jax.runs.metrics import Row
from moe_jax.shapes import Int
from moe_jax.training import evaluate


class Pair(NamedTuple):
  """A validation example of inputs and target.

  Attributes:
    ids: int32 [N], the inputs as the model reads them, cut as in training.
    inputs: The text of the inputs.
    target: The whole text of the target.
    task: The name of the example's source in a mixture, which is its task; ''
      for a single source.
  """

  ids: Int[np.ndarray, ' N']
  inputs: str
  target: str
  task: str = ''


@dataclasses.dataclass(frozen=True)
class GenerateEvaluation(evaluate.EvaluationOptions):
  """Options of the evaluation 'generate': scores of generated outputs."""

  num_examples: int = option(
    64,
    'Number of validation examples, spread over the split; 0 takes all.',
    minimum=0,
  )
  num_tokens: int = option(
    64,
    'Most tokens of an output; learned positions may have room for fewer.',
    minimum=1,
  )
  num_beams: int = option(
    1,
    'Number of beams of the search; 1 takes the likeliest token each time.',
    minimum=1,
  )
  length_penalty: float = option(
    1.0,
    "Exponent of the length that divides a beam's log probability; 0 does not "
    'divide, above 0 favours longer outputs, below 0 shorter ones.',
  )
  metrics: str = option(
    'bleu,chrf,rouge_l,exact_match',
    'Scores, separated by commas, of bleu, chrf, rouge_l and exact_match.',
  )
  bleu_tokenizer: str = option(
    '13a', "BLEU's way to split words, in sacrebleu: 13a, intl, zh, char, none."
  )

  def problems(self) -> Iterator[str]:
    if self.num_beams == 1:
      yield from self.in_vain(
        'unless num_beams is at least 2', 'length_penalty'
      )
    for name in names_of(self.metrics):
      if name not in METRICS:
        problem = unknown_text('metric', name, METRICS)
        yield f'metrics={self.metrics!r}: {problem}'

  def measure(self, setting: evaluate.Setting) -> 'Generate':
    """Reads all examples, and returns the function that measures the scores.

    It takes variables and a step, and returns a row of metrics.

    Raises:
      ValueError: The data has no inputs and targets, there is no room for new
        tokens, or the model does not generate.
    """
    scores = make_scores(self.metrics, self.bleu_tokenizer)
    search = dict(num_beams=self.num_beams, length_penalty=self.length_penalty)
    pairs = self.pairs(setting)
    return generator(setting, scores, pairs, self.num_tokens, **search)

  def pairs(self, setting: evaluate.Setting) -> list[Pair]:
    """The examples: pairs from the source, or windows of text split in two.

    Raises:
      ValueError: The task has no inputs and targets that are text.
    """
    task = setting.data.task
    if not task.generates:
      raise InputError(
        "kind 'generate' needs a task with inputs and targets that are text, "
        f'which {type(task).__name__} does not have'
      )
    texts = data.read_pairs(setting.data, 'validation')
    asker, tokenizer = asker_of(setting), setting.dataset.tokenizer
    if texts is None:
      rows = setting.dataset.splits['validation']
      indices = data.spread(len(rows), self.num_examples)
      return [_window_pair(tokenizer, rows, i) for i in indices]
    total = setting.dataset.counts['validation']['pairs']
    pairs = list(texts)
    if len(pairs) != total:  # encoding a whole split would take long
      # Only pairs with a token in the inputs and one in the target have rows.
      encode = tokenizer.encode
      pairs = [p for p in pairs if all(encode(text).size for text in p)]
    tasks = []
    for name in setting.data.mixture.learned():
      part = setting.dataset.parts[name]
      tasks += [name] * part.counts['validation']['pairs']
    examples = []
    for i in data.spread(min(total, len(pairs)), self.num_examples):
      ids = asker.inputs(pairs[i][0], self.num_tokens)
      # With a single source `tasks` is empty, and the pair has no task.
      examples.append(Pair(ids, *pairs[i], *tasks[i : i + 1]))
    return examples

  def shrunk(self) -> Self:
    """This evaluation at a laptop's size: three short outputs."""
    return dataclasses.replace(
      super().shrunk(), num_examples=3, num_tokens=4, bleu_tokenizer='13a'
    )


def generator(
  setting: evaluate.Setting,
  scores: Mapping[str, Score],
  pairs: list[Pair],
  num_tokens: int,
  **arguments: Any,
) -> 'Generate':
  """Returns a `Generate`: it generates outputs for pairs, and scores them.

  As a function it takes the model's variables and the optimizer step, writes
  the outputs to a file, and returns the row of scores; its method `outputs`
  returns only the texts.

  With learned positions, inputs are cut and outputs end so that both fit.

  Args:
    setting: The run's model, data and folder.
    scores: The scores by name; {} where only `outputs` is called.
    pairs: The pairs of inputs and target.
    num_tokens: Number of tokens at which an output ends.
    **arguments: Other arguments of `generation.generate`, such as `num_beams`.

  Raises:
    ValueError: There is no room for new tokens, or the model does not generate.
  """
  model, tokenizer = setting.model, setting.dataset.tokenizer
  check_generates(model)
  arguments |= trained_run.special_ids(model, tokenizer)
  forced = arguments.get('forced_ids', ())
  if num_tokens <= len(forced):
    raise InputError(
      f'num_tokens={num_tokens} leaves none to choose after {len(forced)} that '
      'the tokenizer forces'
    )
  fitted = [trained_run.fit(model, pair.ids, num_tokens) for pair in pairs]
  arguments['num_tokens'] = min(num_new for _, num_new in fitted)
  pairs = [pair._replace(ids=ids) for pair, (ids, _) in zip(pairs, fitted)]
  return Generate(setting, scores, pairs, arguments)


def _window_pair(tokenizer: Tokenizer, all_rows: data.Rows, row: int) -> Pair:
  """The first window (a stretch of a text) of a row, as inputs and target.

  Every evaluation splits the window at the same token. `row` is the index of
  the row among those of all sources, one source after another.
  """
  parts = iter(all_rows.parts.items())
  task, rows = next(parts)
  while row >= len(rows):
    row -= len(rows)
    task, rows = next(parts)
  windows: Any = rows.source if isinstance(rows, TaskRows) else rows
  generator = np.random.default_rng([0, 0, row])
  example = windows.example(windows.members(row)[0], generator)
  inputs, target = (trained_run.decode(tokenizer, side) for side in example)
  return Pair(example.inputs, inputs, target, task)


@dataclasses.dataclass(frozen=True, eq=False)
class Generate:
  """Measures how similar generated outputs are to targets.

  Attributes:
    setting: The run's model, data and folder.
    scores: The scores by name.
    pairs: The examples.
    arguments: Arguments of `generation.generate`.
  """

  setting: evaluate.Setting
  scores: Mapping[str, Score]
  pairs: list[Pair]
  arguments: dict[str, Any]

  def __call__(self, variables: evaluate.Variables, step: int) -> Row:
    """The scores in percent, and the number of `examples`.

    Inputs, outputs and targets are written to `<name>_examples.txt`.
    """
    outputs = self.outputs(variables)
    targets = [pair.target for pair in self.pairs]
    scores = self.scores.items()
    row = {name: float(s.compute(outputs, targets)) for name, s in scores}
    if is_first():
      self._write(step, row, outputs)
    return {**row, 'examples': len(outputs)}

  def outputs(self, variables: evaluate.Variables) -> list[str]:
    """The generated text for each example."""
    setting, tokenizer = self.setting, self.setting.dataset.tokenizer
    imported = trained_run.is_imported(setting.workdir)
    window = trained_run.window(setting.data, setting.model, imported=imported)
    model, variables = generation.prepare(
      setting.model, variables, window=window
    )
    size = min(setting.put.batch_size, len(self.pairs))
    texts = []
    for start in range(0, len(self.pairs), size):
      evaluate.between_batches()
      # The last batch is filled up, since a batch of another size would need
      # another compiled program.
      batch = self.pairs[start : start + size]
      padded_batch = batch + self.pairs[: size - len(batch)]
      names = [p.task for p in padded_batch if model.stacks.task_sequences]
      ids = [pair.ids for pair in padded_batch]
      tasks = trained_run.task_ids(model, setting.data, names, 'of pairs')
      output = generation.generate(
        model, variables, ids, task_ids=tasks, **self.arguments
      )
      rows = output.rows[: len(batch)]
      texts += [trained_run.decode(tokenizer, row) for row in rows]
    return texts

  def _write(self, step: int, row: Row, outputs: list[str]) -> None:
    lines = [f'step {step}, {len(outputs)} validation pairs']
    for name, score in self.scores.items():
      lines.append(f'{name} {row[name]:.2f} ({score.signature()})')
    texts = ['\n'.join(lines)]
    for pair, output in zip(self.pairs, outputs):
      sides = f'inputs: {pair.inputs}\noutputs: {output}'
      texts.append(f'{sides}\ntargets: {pair.target}')
    path = self.setting.workdir / f'{self.setting.name}_examples.txt'
    workdir_lib.write_text(path, '\n\n'.join(texts) + '\n')
