"""The kind of evaluation 'choice': how often the likeliest answer is right.

The score of an answer is its log-likelihood after its prompt, divided by the
answer's length in tokens, as in GLaM (https://arxiv.org/abs/2112.06905), or in
bytes, or not at all. Examples of the train split may stand before the prompt.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import data
from moe_jax.config import choice, option
from moe_jax.data.choices import ChoiceSourceOptions, SameSource
from moe_jax.data.layouts import Layout, Lengths
from moe_jax.data.packing import packed
from moe_jax.devices import fetch
from moe_jax.errors import InputError
from moe_jax.evaluation import prompts
from moe_jax.models import Model
from moe_jax.runs.metrics import Row
from moe_jax.shapes import Array, Float, Float32
from moe_jax.training import evaluate
from moe_jax.training.step import over_slices

NORMALIZES = ('none', 'tokens', 'bytes')


@dataclasses.dataclass(frozen=True)
class ChoiceEvaluation(prompts.AskingEvaluation):
  """Options of the evaluation 'choice': its questions and its score."""

  source: ChoiceSourceOptions = choice(
    data.CHOICE_SOURCES,
    'docstring_choice',
    'Source of the questions with several answers.',
  )
  num_items: int = option(
    128,
    'Number of questions asked, spread over the validation split; 0 asks all.',
    minimum=0,
  )
  num_shots: int = option(
    0,
    'Number of other questions that are put, with their right answers, before '
    'each question, fewer where a row has no room; 0 is zero-shot.',
    minimum=0,
  )
  shots_source: ChoiceSourceOptions = choice(
    data.SHOTS_SOURCES, 'same', 'Source of the examples before a question.'
  )
  normalize: str = option(
    'tokens',
    "Length of an answer by which its log-likelihood is divided: 'tokens', as "
    "in GLaM, or 'bytes'; 'none' does not divide.",
    choices=NORMALIZES,
  )
  train_split: str = option(
    'train', "The source's own name of the split of the examples."
  )
  validation_split: str = option(
    'validation', "The source's own name of the split of the questions."
  )

  def problems(self) -> Iterator[str]:
    """Yields texts on wrong options for the examples before a question.

    The examples must not come from the split whose questions are asked.
    """
    is_same = isinstance(self.shots_source, SameSource)
    if self.num_shots and is_same and not self.source.has_train_split:
      yield (
        f'num_shots={self.num_shots} of a source that has no train split; '
        'choose another in shots_source'
      )
    if not self.num_shots:
      yield from self.in_vain('unless num_shots is at least 1', 'shots_source')

  def measure(self, setting: evaluate.Setting) -> 'Choice':
    """Encodes all questions, and returns the function that measures accuracy.

    It takes variables and a step, and returns a row of metrics.

    Raises:
      ValueError: The model routes by task; a source is missing or has too few
        items; or an item has characters that the tokenizer lacks.
    """
    if setting.model.stacks.task_sequences:
      raise InputError(
        f"evals.{setting.name} of kind 'choice': the model routes by task, and "
        "its questions are of none of the data's tasks"
      )
    splits = self.train_split, self.validation_split
    selection = data.Selection(splits, setting.data.cache_dir)
    asked = self.source.items('validation', selection)
    if not len(asked):
      raise InputError(f'{self.source} has no items')
    items = [asked[i] for i in data.spread(len(asked), self.num_items)]
    shots: list[list[data.Item]] = [[] for _ in items]
    if self.num_shots:
      is_same = isinstance(self.shots_source, SameSource)
      source = self.source if is_same else self.shots_source
      pool = source.items('train', selection)
      N, K, P = len(items), self.num_shots, len(pool)
      if P < K:
        raise InputError(f'num_shots={K} of {P} train items of {source}')
      # The N * K indices of the examples of all N questions are spread over the
      # P train items, so that the K examples of a question differ.
      shots = [
        [pool[(k * N + i) * P // (N * K)] for k in range(K)] for i in range(N)
      ]
    asker = prompts.asker_of(setting, self.answer_prefix)
    return Choice(setting, self, [*map(asker, items, shots)], asker.layout)

  def shrunk(self) -> Self:
    """This evaluation at a laptop's size, with three built-in questions."""
    return dataclasses.replace(
      super().shrunk(),
      source=data.CHOICE_SOURCES.builtin['docstring_choice'](),
      num_items=3,
      shots_source=data.SHOTS_SOURCES.builtin['same'](),
      train_split='train',
      validation_split='validation',
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Choice:
  """Measures how often the right answer is the likeliest.

  If `model_overrides` let the capacity of experts bind, answers that share a
  batch compete for slots.

  Attributes:
    setting: The run's model, data and folder.
    options: The options of the evaluation.
    questions: The questions in token ids.
    layout: The layout of rows of tokens.
  """

  setting: evaluate.Setting
  options: ChoiceEvaluation
  questions: list[prompts.EncodedQuestion]
  layout: Layout

  def __call__(self, variables: evaluate.Variables, step: int) -> Row:
    """The `accuracy`, `standard_error` and `chance` in percent, and counts.

    `items` is the number of questions, and `cut_items` the number of those that
    had to be cut to fit a row of tokens. If there are examples before the
    questions, `shots` is the mean number of examples that fitted.
    """
    labels = [question.item.label for question in self.questions]
    row = accuracy_row(self.scores(variables), labels)
    row['cut_items'] = sum(q.is_cut for q in self.questions)
    if self.options.num_shots:
      row['shots'] = float(np.mean([q.num_shots for q in self.questions]))
    return row

  def scores(
    self, variables: evaluate.Variables
  ) -> list[Float[np.ndarray, ' A']]:
    """Each question's scores of its A answers.

    They are log-likelihoods, divided by the lengths that `normalize` names.
    """
    asked, unit = self.questions, self.options.normalize
    log_probs = log_likelihoods(self.setting, variables, asked, self.layout)
    return [x / q.lengths(unit) for x, q in zip(log_probs, asked, strict=True)]


def accuracy_row(
  scores: Sequence[Float[np.ndarray, ' _']], labels: Sequence[int]
) -> Row:
  """Returns `accuracy`, `standard_error` and `chance` in percent, and `items`.

  Of answers with equal scores the first counts as chosen; `chance` is the
  expected accuracy of guesses, `items` the number of questions.

  Args:
    scores: The scores of each question's answers.
    labels: The index of each question's right answer.
  """
  right = [int(np.argmax(s)) == label for s, label in zip(scores, labels)]
  count, share = len(right), sum(right) / len(right)
  return {
    'accuracy': 100 * share,
    'standard_error': 100 * float(np.sqrt(share * (1 - share) / count)),
    'chance': 100 * float(np.mean([1 / len(s) for s in scores])),
    'items': count,
  }


def log_likelihoods(
  setting: evaluate.Setting,
  variables: evaluate.Variables,
  questions: Sequence[prompts.EncodedQuestion],
  layout: Layout,
  task_ids: Sequence[int] = (),
) -> list[Float[np.ndarray, ' A']]:
  """The log probability (nats) of each question's A answers after its prompt.

  Args:
    setting: The run's model, data and folder.
    variables: The variables of the run's model.
    questions: The questions, at least one, each with answers that fit a row.
    layout: The layout of rows of tokens; short examples share a row.
    task_ids: The index of each question's task, which a model that routes by
      task needs.
  """
  examples = [e for question in questions for e in question.examples]
  tasks = [t for t, q in zip(task_ids, questions) for _ in q.examples]
  put, batch_size = setting.put, setting.put.batch_size
  a, b = (np.array([len(e[side]) for e in examples]) for side in (0, 1))
  lengths = Lengths(a, b, a + b)
  rows = packed(layout.sizes(lengths), layout.capacity)
  compiled = dict(model=setting.model, microbatches=put.microbatches)

  def scored(begin):
    evaluate.between_batches()
    batch_rows = rows[begin : begin + batch_size]
    padded_rows = batch_rows + [[]] * (batch_size - len(batch_rows))
    batch = layout.assemble([[examples[i] for i in row] for row in padded_rows])
    for name in [n for n in batch if tasks and n.endswith('segment_ids')]:
      task_of = [[0, *(tasks[i] for i in row)] for row in padded_rows]
      pairs = zip(task_of, batch[name])
      task_ids = np.stack([np.array(of, np.int32)[ids] for of, ids in pairs])
      batch[name.replace('segment', 'task')] = task_ids
    log_probs = _log_probs(variables, put(batch), **compiled)
    return batch_rows, batch['segment_ids'], log_probs

  totals = np.zeros(len(examples), np.float64)
  batches = map(scored, range(0, len(rows), batch_size))
  for batch_rows, segment_ids, log_probs in evaluate.behind(batches):
    log_probs = fetch(log_probs).astype(np.float64)
    for b, row in enumerate(batch_rows):
      for segment, i in enumerate(row, 1):
        totals[i] = log_probs[b, segment_ids[b] == segment].sum()
  ends = np.cumsum([len(question.examples) for question in questions])
  return np.split(totals, ends[:-1])


@functools.partial(jax.jit, static_argnames=('model', 'microbatches'))
def _log_probs(
  variables, batch, *, model: Model, microbatches: int
) -> Float32[Array, 'B T']:
  """The log probability of each target in nats, times its loss weight."""

  model = model.with_deferred_logits()

  def of_slice(index, batch):
    outputs, _ = model.apply(variables, **model.inputs(batch))
    nats = model.loss(outputs, batch).nats
    weights = batch['loss_weights']
    return None, jnp.where(weights != 0, -nats * weights, 0.0)

  return over_slices(of_slice, batch, microbatches)[1]
