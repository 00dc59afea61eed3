"""The kind 'choice': which of several answers does the model find likeliest?

Each answer's log-likelihood is taken after its prompt, with examples of the
train split before it, and divided by the answer's length in tokens or not, as
GLaM does (https://arxiv.org/abs/2112.06905). Not here: the text of a prompt
(`prompts.py`).
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import numpy as np
import optax

from moe_jax import data
from moe_jax.config import to_dataclass, unknown
from moe_jax.data.examples import packed
from moe_jax.data.layouts import Example, Layout, Lengths
from moe_jax.distributed import Placing, fetch
from moe_jax.evaluation.prompts import Asked, Asker, layout_of
from moe_jax.evaluation.scores import accuracy
from moe_jax.generation import trained_run
from moe_jax.models import Model
from moe_jax.runs.metrics import Row
from moe_jax.shapes import Array, Float, Float32
from moe_jax.training.evaluate import Setting, Variables

NORMALIZES = ('none', 'tokens', 'bytes')


@dataclasses.dataclass(frozen=True)
class ChoiceOptions:
  """The keys of an entry of kind 'choice'.

  Attributes:
    source: Of the items; see `data.open_items`.
    num_items: How many of the validation split, spread over it; 0: all.
    num_shots: Examples before each prompt, other ones each time.
    shots_source: Where those come from; '': the train split of `source`.
    normalize: By what a log-likelihood is divided: 'none', the answer's
      'tokens' (GLaM) or its 'bytes'.
    answer_prefix: Between a prompt and its answer; see `prompts.Asker`.
    train_split: The source's own name of it.
    validation_split: Likewise.
    prompt_feature: Of a TFDS dataset; see `data.ItemSelection`.
    answers_feature: Likewise.
    label_feature: Likewise.
  """

  source: str
  num_items: int
  num_shots: int
  shots_source: str
  normalize: str
  answer_prefix: str
  train_split: str
  validation_split: str
  prompt_feature: str
  answers_feature: str
  label_feature: str

  def __post_init__(self):
    for name in ('num_items', 'num_shots'):
      if getattr(self, name) < 0:
        raise ValueError(f'{name}={getattr(self, name)} must not be negative')
    if self.normalize not in NORMALIZES:
      raise unknown('normalize', self.normalize, NORMALIZES)
    same = self.num_shots and not self.shots_source
    if same and self.source.startswith('files:'):
      raise ValueError(
        f'num_shots={self.num_shots} of {self.source!r}, which has no train '
        'split; name other files in shots_source'
      )


def make(setting: Setting) -> 'Choice':
  """What measures the entry; all questions are encoded now.

  Raises:
    ValueError: A key is unknown, missing or out of range; a source is missing
      or has too few items; an item has characters that the tokenizer lacks.
  """
  options = to_dataclass(ChoiceOptions, setting.options)
  items, shots = _items(options, setting.config.data.cache_dir)
  layout = layout_of(setting.dataset, setting.config.data.seq_len)
  asker = Asker(
    setting.config,
    setting.dataset.tokenizer,
    layout,
    options.answer_prefix,
    imported=trained_run.is_imported(setting.workdir),
  )
  asked = [asker(item, own) for item, own in zip(items, shots)]
  return Choice(setting, options, items, asked, layout)


def _items(
  options: ChoiceOptions, cache_dir: str
) -> tuple[list[data.Item], list[list[data.Item]]]:
  """Items to judge, and what is shown before each."""
  selection = data.ItemSelection(
    (options.train_split, options.validation_split),
    options.prompt_feature,
    options.answers_feature,
    options.label_feature,
  )
  source = data.open_items(options.source, selection, cache_dir)
  found = source.items('validation')
  if not len(found):
    raise ValueError(f'{source.name} has no items')
  items = [found[i] for i in data.spread(len(found), options.num_items)]
  N, K = len(items), options.num_shots
  if not K:
    return items, [[] for _ in items]
  if options.shots_source:
    source = data.open_items(options.shots_source, selection, cache_dir)
  pool = source.items('train')
  P = len(pool)
  if P < K:
    raise ValueError(f'num_shots={K} of {P} train items of {source.name}')
  # N K places spread over the pool: no two of an item's are the same.
  places = [[(k * N + i) * P // (N * K) for k in range(K)] for i in range(N)]
  return items, [[pool[at] for at in own] for own in places]


@dataclasses.dataclass(frozen=True, eq=False)
class Choice:
  """Measures how often the right answer is the likeliest.

  The model is the training model with the entry's overrides: where those let
  capacity bind, answers that share a batch compete for slots.

  Attributes:
    setting: Of the entry.
    options: Its keys.
    items: The questions.
    asked: Their token ids.
    layout: Of rows.
  """

  setting: Setting
  options: ChoiceOptions
  items: list[data.Item]
  asked: list[Asked]
  layout: Layout

  def __call__(self, variables: Variables, step: int) -> Row:
    """What `judged` says.

    Also how many were `cut_items` for want of room, and with examples the mean
    number of `shots` that there was room for.
    """
    del step
    row = judged(self.scores(variables), [item.label for item in self.items])
    row['cut_items'] = sum(asked.is_cut for asked in self.asked)
    if self.options.num_shots:
      row['shots'] = float(np.mean([asked.num_shots for asked in self.asked]))
    return row

  def scores(self, variables: Variables) -> list[Float[np.ndarray, ' A']]:
    """Of each item, its answers' normalised log-likelihoods."""
    examples = [e for asked in self.asked for e in asked.examples]
    found = log_likelihoods(
      self.setting.model,
      variables,
      examples,
      self.layout,
      batch_size=self.setting.config.batch_size,
      put=self.setting.put,
    )
    answers = [answer for item in self.items for answer in item.answers]
    if self.options.normalize == 'tokens':
      found /= [len(example.targets) for example in examples]
    elif self.options.normalize == 'bytes':
      found /= [len(answer.encode()) for answer in answers]
    ends = np.cumsum([len(item.answers) for item in self.items])
    return np.split(found, ends[:-1])


def judged(
  scores: Sequence[Float[np.ndarray, ' _']], labels: Sequence[int]
) -> Row:
  """See `scores.accuracy`. Of equal answers the first counts as chosen."""
  right = [int(np.argmax(s)) == label for s, label in zip(scores, labels)]
  chance = float(np.mean([1 / len(s) for s in scores]))
  return accuracy(sum(right), len(right), chance)


def log_likelihoods(
  model: Model,
  variables: Variables,
  examples: Sequence[Example],
  layout: Layout,
  *,
  batch_size: int,
  put: Placing,
) -> Float[np.ndarray, ' N']:
  """The log probability (nats) of each example's targets after its inputs.

  Args:
    model: The model.
    variables: Its parameters, under 'params'.
    examples: Each of them fits a row.
    layout: Of the rows; short examples share one.
    batch_size: Rows at once.
    put: Moves batches of `batch_size` rows to devices.
  """
  sides = [np.array([len(e[side]) for e in examples]) for side in (0, 1)]
  lengths = Lengths(*sides, sides[0] + sides[1])
  rows = packed(layout.sizes(lengths), layout.capacity)
  found = np.zeros(len(examples), np.float64)
  for begin in range(0, len(rows), batch_size):
    taken = rows[begin : begin + batch_size]
    filled = taken + [[]] * (batch_size - len(taken))
    batch = layout.assemble([[examples[i] for i in row] for row in filled])
    log_probs = fetch(_compiled(model)(variables, put(batch)))
    log_probs = log_probs.astype(np.float64)
    for b, row in enumerate(taken):
      for segment, i in enumerate(row, 1):
        found[i] = log_probs[b, batch['segment_ids'][b] == segment].sum()
  return found


@functools.lru_cache(maxsize=16)
def _compiled(model: Model):
  return jax.jit(functools.partial(_log_probs, model=model))


def _log_probs(variables, batch, *, model: Model) -> Float32[Array, 'B T']:
  """Of each target; 0 where nothing is asked."""
  logits, _ = model.apply(variables, **model.inputs(batch))
  nats = optax.softmax_cross_entropy_with_integer_labels(
    logits, batch['targets']
  )
  return -nats * batch['loss_weights']
