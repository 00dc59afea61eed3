"""Kinds for the sources of a mixture: the loss of each, the score of each.

The kind 'source_losses' measures the validation loss of every source. The kind
'source_scores' answers the validation questions of every source: by the
likeliest choice where there are choices, by generated text otherwise. Not here:
the questions (`moe_jax.data.sources`).
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple, Self

import numpy as np

from moe_jax import data
from moe_jax.data import Question
from moe_jax.data.layouts import Layout
from moe_jax.evaluation.choice import log_likelihoods
from moe_jax.evaluation.generated_text import Pair, generator
from moe_jax.evaluation.prompts import Asked, Asker, AskingEvaluation
from moe_jax.evaluation.scores import make_scores
from moe_jax.options import at_least, one_of, option
from moe_jax.runs.metrics import Row
from moe_jax.training.evaluate import (
  BatchesEvaluation,
  Losses,
  Setting,
  Variables,
)

Questions = dict[str, list[Question]]


@dataclasses.dataclass(frozen=True)
class SourceLosses(BatchesEvaluation):
  """The kind 'source_losses': the loss of each source by itself."""

  split: str = option(
    'validation',
    "Split of each source whose loss is measured: 'validation', or 'train' for "
    'how far each is overfitted.',
    one_of(*data.SPLITS),
  )

  def measure(self, setting: Setting) -> Callable[[Variables, int], Row]:
    """Returns the function that measures the losses.

    Raises:
      ValueError: The run's data is no mixture.
    """
    parts = setting.dataset.parts
    if not parts:
      raise ValueError(
        "kind 'source_losses' needs a mixture, data.mixture.sources; of a "
        "single source, kind 'loss' measures the loss"
      )
    losses = {
      name: Losses.of(
        dataclasses.replace(setting, dataset=part), self.num_batches, self.split
      )
      for name, part in parts.items()
    }
    mixture = setting.data.mixture

    def measured(variables: Variables, step: int) -> Row:
      values = {
        name: float(of_source(variables, step)['loss'])
        for name, of_source in losses.items()
      }
      return summarized(values, mixture)

    return measured


@dataclasses.dataclass(frozen=True)
class SourceScores(AskingEvaluation):
  """The kind 'source_scores': the score of each source's questions."""

  num_questions: int = option(
    32,
    'Number of questions of each source, spread over its validation split; 0 '
    'asks all.',
    at_least(0),
  )
  num_tokens: int = option(
    32,
    'Number of tokens at which a generated answer ends; learned positions may '
    'have room for fewer. With 0 only questions with choices are asked.',
    at_least(0),
  )

  def measure(self, setting: Setting) -> 'Scores':
    """Returns the function that measures the scores; encodes all now.

    Raises:
      ValueError: The task has no inputs and targets that are text, a question
        has characters that the tokenizer lacks, or those of one source are
        judged by several scores.
    """
    task = setting.data.task
    if task.reads != 'pairs':
      raise ValueError(
        f"kind 'source_scores' needs a task on pairs, and "
        f'{type(task).__name__} reads {task.reads}'
      )
    questions = self._questions(setting)
    if not self.num_tokens:
      questions = {
        name: [question for question in of_source if question.choices]
        for name, of_source in questions.items()
      }
    if not any(questions.values()):
      raise ValueError('no source has a validation question that is asked')
    asker = self.asker(setting)
    chosen = _chosen(questions, asker)
    written = _written(questions, asker, self.num_tokens)
    generate = None
    if any(written.values()):
      pairs = [p for of_source in written.values() for p in of_source]
      made = generator(setting, {}, lambda: pairs, self.num_tokens)
      generate = made.outputs
    return Scores(setting, questions, chosen, written, asker.layout, generate)

  def _questions(self, setting: Setting) -> Questions:
    """The questions of every source, spread over its validation split."""
    options = setting.data
    sources = options.mixture.sources or {'source': options.source}
    prefix, some = options.task.input_prefix, {}
    for name, source in sorted(sources.items()):
      every = source.questions(options.selection)
      judged = {'choice' if q.choices else q.metric for q in every}
      if len(judged) > 1:
        raise ValueError(
          f'the questions of source {name!r} are judged by {sorted(judged)}; '
          'make it a source for each'
        )
      places = data.spread(len(every), self.num_questions)
      some[name] = [
        every[i]._replace(inputs=prefix + every[i].inputs) for i in places
      ]
    return some

  def shrunk(self) -> Self:
    """The same evaluation of two questions and short answers."""
    return dataclasses.replace(
      super().shrunk(), num_questions=2, num_tokens=min(self.num_tokens, 4)
    )


class _Choice(NamedTuple):
  """A question with choices in token ids, and the number of the right one."""

  asked: Asked
  label: int


def _chosen(questions: Questions, asker: Asker) -> dict[str, list[_Choice]]:
  return {
    name: [
      _Choice(
        asker(data.Item(q.inputs, q.choices, 0), ()),
        q.choices.index(q.target),
      )
      for q in of_source
      if q.choices
    ]
    for name, of_source in questions.items()
  }


def _written(
  questions: Questions, asker: Asker, num_tokens: int
) -> dict[str, list[Pair]]:
  return {
    name: [
      Pair(asker.inputs(q.inputs, num_tokens), q.inputs, q.target, name)
      for q in of_source
      if not q.choices
    ]
    for name, of_source in questions.items()
  }


@dataclasses.dataclass(frozen=True, eq=False)
class Scores:
  """Measures the scores of the questions of each source.

  Attributes:
    setting: The parts of the run.
    questions: The questions of each source.
    chosen: Those with choices, in token ids.
    written: Those whose answer is any text, as prompts.
    layout: The layout of rows.
    generate: The function that answers the prompts of all sources, in order;
      None without prompts.
  """

  setting: Setting
  questions: Questions
  chosen: dict[str, list[_Choice]]
  written: dict[str, list[Pair]]
  layout: Layout
  generate: Callable[[Variables], list[str]] | None

  def __call__(self, variables: Variables, step: int) -> Row:
    """The row of `summarized`, scores in percent.

    Where a source has choices, `<source>.chance` is the score of guessing and
    `<source>.nats` the mean negative log-likelihood of the right answer.
    """
    del step
    scores, more = self._by_choice(variables)
    scores |= self._by_text(variables)
    in_order = {name: scores[name] for name in self.questions if name in scores}
    row = summarized(in_order, self.setting.data.mixture)
    return {**row, **more}

  def _by_choice(self, variables: Variables) -> tuple[Row, Row]:
    every = [c for of_source in self.chosen.values() for c in of_source]
    examples = [e for choice in every for e in choice.asked.examples]
    if not examples:
      return {}, {}
    numbers = {name: i for i, name in enumerate(self.setting.data.tasks)}
    tasks = [
      numbers[name]
      for name, of_source in self.chosen.items()
      if numbers
      for choice in of_source
      for _ in choice.asked.examples
    ]
    found = log_likelihoods(
      self.setting.model,
      variables,
      examples,
      self.layout,
      batch_size=self.setting.batch_size,
      put=self.setting.put,
      task_ids=tasks,
    )
    # As in the kind 'choice', a long answer is no worse for being long.
    per_token = found / [len(example.targets) for example in examples]
    ends = np.cumsum([len(choice.asked.examples) for choice in every])[:-1]
    judged = iter(zip(np.split(found, ends), np.split(per_token, ends), every))
    scores, more = {}, {}
    for name, of_source in self.chosen.items():
      taken = [next(judged) for _ in of_source]
      if not taken:
        continue
      right = [int(np.argmax(n)) == c.label for _, n, c in taken]
      scores[name] = 100 * float(np.mean(right))
      chance = np.mean([1 / len(n) for _, n, _ in taken])
      more[f'{name}.chance'] = 100 * float(chance)
      more[f'{name}.nats'] = -float(np.mean([t[c.label] for t, _, c in taken]))
    return scores, more

  def _by_text(self, variables: Variables) -> Row:
    if self.generate is None:
      return {}
    outputs, scores = iter(self.generate(variables)), {}
    for name, pairs in self.written.items():
      if pairs:
        metric = self.questions[name][0].metric
        (score,) = make_scores(metric).values()
        answers = [next(outputs) for _ in pairs]
        targets = [pair.target for pair in pairs]
        scores[name] = float(score.compute(answers, targets))
    return scores


def summarized(
  values: Mapping[str, float], mixture: data.MixtureOptions
) -> Row:
  """A row: each source's value, and means over sources and over clusters.

  `mean` is over the sources that are learned from, `cluster_mean` over their
  clusters, each of which is the mean of its sources; `held_out_mean` and
  `held_out_cluster_mean` are over all others. A cluster of several sources has
  its own mean as `cluster.<name>`.

  Args:
    values: The value of each source.
    mixture: The options of the mixture; without sources all are learned from.
  """
  row: Row = dict(values)
  learned = set(mixture.learned() if mixture.sources else values)
  clusters: dict[str, dict[str, float]] = {}
  for name, value in values.items():
    of = mixture.cluster(name) if mixture.sources else name
    clusters.setdefault(of, {})[name] = value
  for cluster, own in clusters.items():
    if len(own) > 1:
      row[f'cluster.{cluster}'] = float(np.mean([*own.values()]))
  for prefix, wanted in (('', True), ('held_out_', False)):
    groups = [
      [value for name, value in own.items() if (name in learned) == wanted]
      for own in clusters.values()
    ]
    groups = [group for group in groups if group]
    if groups:
      row[f'{prefix}mean'] = float(np.mean([v for g in groups for v in g]))
      row[f'{prefix}cluster_mean'] = float(np.mean([*map(np.mean, groups)]))
  return row
