"""Kinds of evaluation for the sources of a mixture: losses and scores.

The kind 'source_losses' measures the validation loss of every source. The kind
'source_scores' answers the validation questions of every source: by the
likeliest choice where there are choices, by generated text otherwise.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Self

import numpy as np

from moe_jax import data
from moe_jax.config import option
from moe_jax.data.layouts import Layout
from moe_jax.errors import InputError
from moe_jax.evaluation import prompts
from moe_jax.evaluation.choice import accuracy_row, log_likelihoods
from moe_jax.evaluation.generated_text import Pair, generator
from moe_jax.evaluation.scores import make_scores
from moe_jax.runs.metrics import Row
from moe_jax.training import evaluate


@dataclasses.dataclass(frozen=True)
class SourceLosses(evaluate.LossEvaluation):
  """Options of the evaluation 'source_losses': the loss of each source."""

  def measure(self, setting: evaluate.Setting) -> evaluate.Measure:
    """Returns the function from variables and a step to the row of losses.

    The row is that of `summary_row`, of each source's loss in nats per token.

    Raises:
      ValueError: The run's data is no mixture.
    """
    datasets = setting.dataset.parts
    if not datasets:
      raise InputError(
        "kind 'source_losses' needs a mixture, data.mixture.sources; of a "
        "single source, kind 'loss' measures the loss"
      )
    s, n = setting, self.num_batches
    loss_functions = {
      name: evaluate.Losses(s.model, n, part.splits[self.split], s.put)
      for name, part in datasets.items()
    }
    mixture = setting.data.mixture

    def losses_row(variables: evaluate.Variables, step: int) -> Row:
      values = {
        name: float(loss_of(variables, step)['loss'])
        for name, loss_of in loss_functions.items()
      }
      return summary_row(values, mixture)

    return losses_row


@dataclasses.dataclass(frozen=True)
class SourceScores(prompts.AskingEvaluation):
  """Options of the evaluation 'source_scores': the score of each source."""

  num_questions: int = option(
    32,
    'Number of questions of a source, spread over validation; 0 asks all.',
    minimum=0,
  )
  num_tokens: int = option(
    32,
    'Number of tokens at which a generated answer ends; learned positions may '
    'have room for fewer. With 0 only questions with choices are asked.',
    minimum=0,
  )

  def measure(self, setting: evaluate.Setting) -> evaluate.Measure:
    """Encodes all questions, and returns the function that measures the scores.

    From variables and a step, the function gives a row of each source's score
    in percent and the means that `summary_row` adds. Where a source has
    choices, `<source>.chance` is the score of guessing and `<source>.nats` the
    mean negative log-likelihood of the right answer.

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
    if not questions:
      raise InputError('no source has a validation question that is asked')
    asker = prompts.asker_of(setting, self.answer_prefix)
    choices = [(n, asker(_item(q), ())) for n, q in questions if q.choices]
    pairs = [
      Pair(asker.inputs(q.inputs, self.num_tokens), q.inputs, q.target, name)
      for name, q in questions
      if not q.choices
    ]
    metrics = {name: q.metric for name, q in questions}
    texts = generator(setting, {}, pairs, self.num_tokens) if pairs else None

    def scores_row(variables: evaluate.Variables, step: int) -> Row:
      scores, details = _choice_scores(
        setting, variables, choices, asker.layout
      )
      outputs = texts.outputs(variables) if texts is not None else []
      scores |= text_scores(pairs, outputs, metrics)
      in_order = {name: scores[name] for name in metrics}
      return {**summary_row(in_order, setting.data.mixture), **details}

    return scores_row

  def _questions(
    self, setting: evaluate.Setting
  ) -> list[tuple[str, data.Question]]:
    """Pairs of the name of a source and a question of its validation split.

    If `num_tokens` is 0, questions without choices are left out.
    """
    options, questions = setting.data, []
    sources = options.mixture.sources or {'source': options.source}
    for name, source in sorted(sources.items()):
      all_questions = source.questions(options.selection)
      metrics = {'choice' if q.choices else q.metric for q in all_questions}
      if len(metrics) > 1:
        raise InputError(
          f'the questions of source {name!r} are judged by {sorted(metrics)}; '
          'make one source for each of these'
        )
      for i in data.spread(len(all_questions), self.num_questions):
        question = all_questions[i]
        if self.num_tokens or question.choices:
          inputs = options.task.input_prefix + question.inputs
          questions.append((name, question._replace(inputs=inputs)))
    return questions

  def shrunk(self) -> Self:
    """This evaluation at a laptop's size: two questions of each source.

    Answers have at most 4 tokens.
    """
    return dataclasses.replace(
      super().shrunk(), num_questions=2, num_tokens=min(self.num_tokens, 4)
    )


def _item(question: data.Question) -> data.Item:
  """A question with choices as an item, which an `Asker` encodes.

  The item has the right choice's index.
  """
  label = question.choices.index(question.target)
  return data.Item(question.inputs, question.choices, label)


def _choice_scores(
  setting: evaluate.Setting,
  variables: evaluate.Variables,
  asked: Sequence[tuple[str, prompts.EncodedQuestion]],
  layout: Layout,
) -> tuple[Row, Row]:
  """Each source's accuracy in percent by its name; and a row of details.

  The details are `<source>.chance`, the accuracy of guessing, and
  `<source>.nats`, the mean negative log-likelihood of the right answer. `asked`
  has pairs of a source's name and a question.
  """
  scores, details, tasks = {}, {}, setting.data.tasks
  if not asked:
    return scores, details
  task_ids = [tasks.index(name) for name, _ in asked if tasks]
  encoded = [question for _, question in asked]
  log_probs = log_likelihoods(setting, variables, encoded, layout, task_ids)
  for name in dict.fromkeys(name for name, _ in asked):
    own = [(q, x) for (source, q), x in zip(asked, log_probs) if source == name]
    # Log probabilities are divided by the number of tokens, so that an answer
    # is not less likely to be chosen for being longer.
    answers = [log_prob / q.lengths('tokens') for q, log_prob in own]
    row = accuracy_row(answers, [q.item.label for q, _ in own])
    scores[name], details[f'{name}.chance'] = row['accuracy'], row['chance']
    nats = [-log_prob[q.item.label] for q, log_prob in own]
    details[f'{name}.nats'] = float(np.mean(nats))
  return scores, details


def text_scores(
  pairs: Sequence[Pair], outputs: Sequence[str], metrics: Mapping[str, str]
) -> Row:
  """The score of each source whose answers are free text, not choices.

  Args:
    pairs: The questions; the `task` of a question is its source.
    outputs: The answer to each question.
    metrics: The name of the score of each source.
  """
  scores = {}
  for name in dict.fromkeys(pair.task for pair in pairs):
    (score,) = make_scores(metrics[name]).values()
    answers = [o for o, pair in zip(outputs, pairs) if pair.task == name]
    targets = [pair.target for pair in pairs if pair.task == name]
    scores[name] = float(score.compute(answers, targets))
  return scores


def summary_row(
  values: Mapping[str, float], mixture: data.MixtureOptions
) -> Row:
  """A row of metrics: each source's value, and means over groups of sources.

  `mean` is over the sources that are learned from. `cluster_mean` is over their
  clusters (groups of similar sources), each of which counts as the mean of its
  sources. `held_out_mean` and `held_out_cluster_mean` are over all sources that
  are not learned from. A cluster of several sources has its own mean as
  `cluster.<name>`.

  Args:
    values: The value of each source.
    mixture: The options of the mixture; if it has no sources, every source in
      `values` counts as learned from.
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
