"""Questions as token ids: examples, the prompt, and its answers.

As in GLaM (https://arxiv.org/abs/2112.06905) and GPT-3, examples with their
right answers stand before the prompt, with two newlines between.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from moe_jax import data
from moe_jax.config import option
from moe_jax.data.layouts import DecoderLayout, Example, Layout
from moe_jax.data.tasks.seq2seq import cut_inputs
from moe_jax.data.tokenizers import Tokenizer
from moe_jax.errors import InputError
from moe_jax.generation import trained_run
from moe_jax.shapes import Int
from moe_jax.training.evaluate import ROOM_FOR_ALL, EvaluationOptions, Setting

_SEPARATOR = '\n\n'


class EncodedQuestion(NamedTuple):
  """A question in token ids.

  Attributes:
    examples: For each answer, the prompt, with the shots before it, as inputs
      and the answer as targets.
    num_shots: Number of shots, other questions with their right answers, that
      fitted before the prompt.
    is_cut: Whether the prompt or an answer had to be cut.
    item: The question.
  """

  examples: list[Example]
  num_shots: int
  is_cut: bool
  item: data.Item

  def lengths(self, unit: str) -> Int[np.ndarray, ' A']:
    """The length of each of A answers in 'tokens' or 'bytes'; 1 for 'none'."""
    if unit == 'bytes':
      return np.array([len(answer.encode()) for answer in self.item.answers])
    tokens = np.array([len(example.targets) for example in self.examples])
    return tokens if unit == 'tokens' else np.ones_like(tokens)


@dataclasses.dataclass(frozen=True)
class Asker:
  """Encodes questions in the same way as the training examples of a run.

  A language model or prefix language model continues the prompt and
  `answer_prefix`. All other models have the prompt as inputs, and the answer
  with an EOS as targets.

  Attributes:
    task: The task on which the run is trained.
    tokenizer: The run's tokenizer.
    layout: The layout of the run's rows, to which questions are cut.
    answer_prefix: Text between a prompt and its answer, where a model continues
      the prompt.
    imported: Whether the model began as a checkpoint of Hugging Face.
  """

  task: data.TaskOptions
  tokenizer: Tokenizer
  layout: Layout
  answer_prefix: str
  imported: bool = False

  @property
  def goes_on(self) -> bool:
    """Whether the answer continues the prompt, in one text."""
    one_text = isinstance(self.layout, DecoderLayout)
    return one_text and self.task.answers_go_on

  def __call__(
    self, item: data.Item, shots: Sequence[data.Item]
  ) -> EncodedQuestion:
    """The question behind as many of the last `shots` as fit into its row.

    No answer is cut to make room for shots. A prompt that is too long without
    shots loses its beginning if the answer continues it, or else is cut as in
    training.

    Raises:
      ValueError: The prompt or an answer has no tokens.
    """
    texts = [s.prompt + self.answer_prefix + s.answers[s.label] for s in shots]
    for n in range(len(shots), -1, -1):
      text = _SEPARATOR.join([*texts[len(shots) - n :], item.prompt])
      examples = [self._example(text, answer) for answer in item.answers]
      cut_examples = [self._cut(example) for example in examples]
      if all(map(self._has_room, examples, cut_examples)):
        break
    pairs = zip(examples, cut_examples)
    is_cut = any(sum(map(len, a)) > sum(map(len, b)) for a, b in pairs)
    return EncodedQuestion(cut_examples, n, is_cut, item)

  def inputs(self, prompt: str, num_tokens: int) -> Int[np.ndarray, ' N']:
    """The ids of a prompt, cut so that `num_tokens` of an answer fit a row."""
    ids = self._encode(prompt)
    return self.cut_inputs(ids, self._lengths(len(ids), num_tokens)[0])

  def cut_inputs(
    self, ids: Int[np.ndarray, ' N'], length: int
  ) -> Int[np.ndarray, ' n']:
    """At most `length` of N ids: the first or, with `task.keep_end`, the last.

    An EOS at the end is kept.
    """
    if len(ids) <= length:
      return ids
    ends = int(len(ids) and ids[-1] == self.tokenizer.eos_id)
    body, end = np.split(ids, [len(ids) - ends])
    body = cut_inputs(body, length - ends, keep_end=self.task.keep_end)
    return np.append(body, end)

  def _example(self, prompt: str, answer: str) -> Example:
    if self.goes_on:
      # Prompt and answer are encoded together, as a token may span their
      # border. The inputs are the first tokens, as far as they are those of the
      # prompt encoded alone.
      prompt_ids = self._encode(prompt + self.answer_prefix)
      all_ids = self._encode(prompt + self.answer_prefix + answer)
      n = min(len(prompt_ids), len(all_ids))
      num_common = int(np.cumprod(prompt_ids[:n] == all_ids[:n]).sum())
      inputs, targets = all_ids[:num_common], all_ids[num_common:]
    else:
      inputs = self._encode(prompt)
      eos_id: Any = self.tokenizer.eos_id
      targets = np.append(self.tokenizer.encode(answer), eos_id)
    if not len(inputs) or not len(targets):
      raise InputError(f'no tokens in prompt {prompt!r} or answer {answer!r}')
    return Example(inputs.astype(np.int32), targets.astype(np.int32))

  def _encode(self, text: str) -> Int[np.ndarray, ' N']:
    return trained_run.encode(
      self.task, self.tokenizer, text, imported=self.imported
    )

  def _has_room(self, example: Example, cut_example: Example) -> bool:
    """Whether cutting kept all inputs, and all targets that can fit a row."""
    _, room = self._lengths(1, len(example.targets))
    lengths = len(cut_example.inputs), len(cut_example.targets)
    return lengths == (len(example.inputs), room)

  def _cut(self, example: Example) -> Example:
    inputs, targets = example
    n, m = self._lengths(len(inputs), len(targets))
    if self.goes_on:
      return Example(inputs[len(inputs) - n :], targets[:m])
    return Example(self.cut_inputs(inputs, n), targets[:m])

  def _lengths(self, inputs: int, targets: int) -> tuple[int, int]:
    """The lengths to which inputs and targets of given lengths are cut."""
    lengths = self.layout.cut(np.array([inputs]), np.array([targets]))
    return int(lengths.inputs[0]), int(lengths.targets[0])


@dataclasses.dataclass(frozen=True)
class AskingEvaluation(EvaluationOptions):
  """Options of an evaluation by questions; by default experts drop no token."""

  model_overrides: Mapping[str, Any] = option(
    ROOM_FOR_ALL,
    'Keys of the section `model`, nested, with the values that they have in '
    'this evaluation; by default every expert has room for all tokens, as in '
    'generation. They must not change the shape of a parameter.',
  )
  answer_prefix: str = option(
    '\n',
    'Text between a prompt and its answer, for a model that continues texts; '
    'other models end a prompt with a token.',
  )


def asker_of(setting: Setting, answer_prefix: str = '') -> Asker:
  """The `Asker` that encodes questions for a run.

  `answer_prefix` stands before an answer that continues its prompt.
  """
  # Rows of a language model hold text without inputs and targets, and have no
  # layout. Questions get a decoder's layout and are cut to such a row's length.
  layout = setting.dataset.splits['validation'].layout
  return Asker(
    setting.data.task,
    setting.dataset.tokenizer,
    layout or DecoderLayout(setting.data.seq_len),
    answer_prefix,
    imported=trained_run.is_imported(setting.workdir),
  )
