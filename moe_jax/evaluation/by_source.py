"""Kinds for the sources of a mixture: the loss of each, the score of each.

The kind 'source_losses' measures the validation loss of every source. The kind
'source_scores' answers the validation questions of every source: by the
likeliest choice where there are choices, by generated text otherwise.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Self

import numpy as np

from moe_jax import data
from moe_jax.config import option
from moe_jax.data import DataOptions, Question
from moe_jax.data.layouts import Layout
from moe_jax.errors import InputError
from moe_jax.evaluation.choice import accuracy_row, log_likelihoods
from moe_jax.evaluation.generated_text import Pair, generator
from moe_jax.evaluation.prompts import AskingEvaluation, EncodedQuestion
from moe_jax.evaluation.scores import make_scores
from moe_jax.runs.metrics import Row
from moe_jax.training.evaluate import (
  EvaluationOptions,
  Losses,
  Setting,
  Variables,
  every_steps_option,
  num_batches_option,
)

Questions = dict[str, list[Question]]


@dataclasses.dataclass(frozen=True)
class SourceLosses(EvaluationOptions):
  """The kind 'source_losses': the loss of each source by itself."""

  every_steps: int = every_steps_option(500)
  num_batches: int = num_batches_option()
  split: str = option(
    'validation',
    "Split of each source whose loss is measured: 'validation', or 'train' for "
    'how far each is overfitted.',
    choices=data.SPLITS,
  )

  def measure(self, setting: Setting) -> Callable[[Variables, int], Row]:
    """Returns the function that measures the losses.

    Raises:
      ValueError: The run's data is no mixture.
    """
    datasets = setting.dataset.parts
    if not datasets:
      raise InputError(
        "kind 'source_losses' needs a mixture, data.mixture.sources; of a "
        "single source, kind 'loss' measures the loss"
      )
    loss_functions = {
      name: Losses.of(
        dataclasses.replace(setting, dataset=part), self.num_batches, self.split
      )
      for name, part in datasets.items()
    }
    mixture = setting.data.mixture

    def losses_row(variables: Variables, step: int) -> Row:
      values = {
        name: float(loss_of(variables, step)['loss'])
        for name, loss_of in loss_functions.items()
      }
      return summary_row(values, mixture)

    return losses_row

  def row_names(self, data: DataOptions) -> Collection[str]:
    """The names in a `summary_row`."""
    mixture = data.mixture
    return summary_row(dict.fromkeys(mixture.sources, 0.0), mixture)

  def shrunk(self) -> Self:
    """The same evaluation on one batch."""
    return dataclasses.replace(super().shrunk(), num_batches=1)


@dataclasses.dataclass(frozen=True)
class SourceScores(AskingEvaluation):
  """The kind 'source_scores': the score of each source's questions."""

  num_questions: int = option(
    32,
    'Number of questions of each source, spread over its validation split; 0 '
    'asks all.',
    minimum=0,
  )
  num_tokens: int = option(
    32,
    'Number of tokens at which a generated answer ends; learned positions may '
    'have room for fewer. With 0 only questions with choices are asked.',
    minimum=0,
  )

  def measure(self, setting: Setting) -> 'Scores':
    """Returns the function that measures the scores; encodes all now.

    Raises:
      ValueError: The task has no inputs and targets that are text, a question
        has characters that the tokenizer lacks, or the questions of one source
        are judged by several scores.
    """
    task = setting.data.task
    if task.reads != 'pairs':
      raise InputError(
        f"kind 'source_scores' needs a task on pairs, and "
        f'{type(task).__name__} reads {task.reads}'
      )
    questions = self._questions(setting)
    if not any(questions.values()):
      raise InputError('no source has a validation question that is asked')
    asker, choices, prompts = self.asker(setting), {}, {}
    for name, asked in questions.items():
      choices[name] = [
        (
          asker(data.Item(q.inputs, q.choices, 0), ()),
          q.choices.index(q.target),
        )
        for q in asked
        if q.choices
      ]
      prompts[name] = [
        Pair(asker.inputs(q.inputs, self.num_tokens), q.inputs, q.target, name)
        for q in asked
        if not q.choices
      ]
    generate = None
    if any(prompts.values()):
      pairs = [p for source_pairs in prompts.values() for p in source_pairs]
      measurement = generator(setting, {}, lambda: pairs, self.num_tokens)
      generate = measurement.outputs
    return Scores(setting, questions, choices, prompts, asker.layout, generate)

  def row_names(self, data: DataOptions) -> Collection[str]:
    """The names in a row of `Scores`."""
    mixture = data.mixture
    sources = list(mixture.sources or ['source'])
    details = [f'{s}.{name}' for s in sources for name in ('chance', 'nats')]
    return [*summary_row(dict.fromkeys(sources, 0.0), mixture), *details]

  def _questions(self, setting: Setting) -> Questions:
    """The questions of every source, spread over its validation split.

    Without tokens for an answer, those without choices are left out.
    """
    options = setting.data
    sources = options.mixture.sources or {'source': options.source}
    prefix, questions = options.task.input_prefix, {}
    for name, source in sorted(sources.items()):
      all_questions = source.questions(options.selection)
      metrics = {'choice' if q.choices else q.metric for q in all_questions}
      if len(metrics) > 1:
        raise InputError(
          f'the questions of source {name!r} are judged by {sorted(metrics)}; '
          'make one source for each of these'
        )
      indices = data.spread(len(all_questions), self.num_questions)
      questions[name] = [
        all_questions[i]._replace(inputs=prefix + all_questions[i].inputs)
        for i in indices
        if self.num_tokens or all_questions[i].choices
      ]
    return questions

  def shrunk(self) -> Self:
    """The same evaluation of two questions and short answers."""
    return dataclasses.replace(
      super().shrunk(), num_questions=2, num_tokens=min(self.num_tokens, 4)
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Scores:
  """Measures the scores of the questions of each source.

  Attributes:
    setting: The parts of the run.
    questions: The questions of each source.
    choices: The questions with choices, in token ids, each with the number of
      the right one.
    prompts: The questions whose answer is any text, as prompts.
    layout: The layout of rows.
    generate: The function that answers the prompts of all sources, in order;
      None without prompts.
  """

  setting: Setting
  questions: Questions
  choices: dict[str, list[tuple[EncodedQuestion, int]]]
  prompts: dict[str, list[Pair]]
  layout: Layout
  generate: Callable[[Variables], list[str]] | None

  def __call__(self, variables: Variables, step: int) -> Row:
    """The row of `summary_row`, scores in percent.

    Where a source has choices, `<source>.chance` is the score of guessing and
    `<source>.nats` the mean negative log-likelihood of the right answer.
    """
    del step
    scores, details = self._by_choice(variables)
    scores |= self._by_text(variables)
    in_order = {name: scores[name] for name in self.questions if name in scores}
    row = summary_row(in_order, self.setting.data.mixture)
    return {**row, **details}

  def _by_choice(self, variables: Variables) -> tuple[Row, Row]:
    examples, tasks, names = [], [], self.setting.data.tasks
    for name, choices in self.choices.items():
      for question, _ in choices:
        examples += question.examples
        tasks += [names.index(name) for _ in question.examples if names]
    if not examples:
      return {}, {}
    log_probs = log_likelihoods(
      self.setting.model,
      variables,
      examples,
      self.layout,
      batch_size=self.setting.batch_size,
      put=self.setting.put,
      task_ids=tasks,
    )
    # As in the kind 'choice', a long answer is no worse for being long.
    per_token = log_probs / [len(example.targets) for example in examples]
    scores, details, begin = {}, {}, 0
    for name, choices in self.choices.items():
      answers, nats = [], []
      for question, label in choices:
        end = begin + len(question.examples)
        answers.append(per_token[begin:end])
        nats.append(-log_probs[begin + label])
        begin = end
      if choices:
        row = accuracy_row(answers, [label for _, label in choices])
        scores[name], details[f'{name}.chance'] = row['accuracy'], row['chance']
        details[f'{name}.nats'] = float(np.mean(nats))
    return scores, details

  def _by_text(self, variables: Variables) -> Row:
    if self.generate is None:
      return {}
    outputs, scores = iter(self.generate(variables)), {}
    for name, pairs in self.prompts.items():
      if pairs:
        metric = self.questions[name][0].metric
        (score,) = make_scores(metric).values()
        answers = [next(outputs) for _ in pairs]
        targets = [pair.target for pair in pairs]
        scores[name] = float(score.compute(answers, targets))
    return scores


def summary_row(
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
    cluster = mixture.cluster(name) if mixture.sources else name
    clusters.setdefault(cluster, {})[name] = value
  for cluster, members in clusters.items():
    if len(members) > 1:
      row[f'cluster.{cluster}'] = float(np.mean([*members.values()]))
  for prefix, learns in (('', True), ('held_out_', False)):
    groups = [
      [value for name, value in members.items() if (name in learned) == learns]
      for members in clusters.values()
    ]
    groups = [group for group in groups if group]
    if groups:
      row[f'{prefix}mean'] = float(np.mean([v for g in groups for v in g]))
      row[f'{prefix}cluster_mean'] = float(np.mean([*map(np.mean, groups)]))
  return row
