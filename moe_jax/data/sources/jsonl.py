"""Examples with instructions in a user's files, one JSON object in each line.

A line has `inputs` and `targets`, or the `messages` of a conversation: objects
with a `role` ('system', 'user' or 'assistant') and its `content`; an answer of
`weight` 0 is not learned.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

from moe_jax.config import unknown
from moe_jax.data.contracts import Pair, Pairs, Selection, SourceOptions
from moe_jax.data.document_files import PATTERN_OPTION, json_lines
from moe_jax.data.plain_files import check_text
from moe_jax.data.sources.python_stdlib import split_of
from moe_jax.data.store import Digest
from moe_jax.data.urls import matching
from moe_jax.errors import InputError

ROLES = ('system', 'user', 'assistant')
_ANSWERS = ROLES[-1]


@dataclasses.dataclass(frozen=True)
class JsonlSource(SourceOptions):
  """Pairs in lines of JSON with `inputs` and `targets`, or with `messages`.

  Every answer of a conversation makes a pair: everything before the answer is
  the inputs, so that each answer is learned once, and nothing else is learned.
  An answer with `"weight": 0`, as OpenAI's fine-tuning has it, is only a part
  of inputs. With the task seq2seq, set `task.seq2seq.keep_end`, so that the end
  of a long conversation is kept.
  """

  pattern: str = PATTERN_OPTION

  def pairs(self, selection: Selection = Selection()) -> Pairs:
    """The pairs of all lines, in order of path and line.

    About one line in 20 is for validation, by a hash of the inputs of its first
    pair, so that equal inputs are in one split, whatever their answers are.

    Raises:
      ValueError: No file matches, a line is no example (file and line are
        named), or a split is neither 'train' nor 'validation'.
    """
    selection.check_splits('jsonl')
    paths, digest, total = matching(self.pattern), Digest(), 0
    for where, line, value in json_lines(paths):
      pairs_of(value, where)  # a bad line is refused now
      digest.text(line)
      total += 1

    def of_split(split: str) -> Iterator[Pair]:
      name = selection.name_of(split)
      for where, _, value in json_lines(paths):
        pairs = pairs_of(value, where)
        if split_of(pairs[0][0]) == name:
          yield from pairs

    return Pairs(
      f'jsonl:{self.pattern} ({len(paths)} files, {total} lines)',
      # The 2 is a version: since version 2, answers of weight 0 are left out.
      f'jsonl 2 {digest.hexdigest()} {selection.splits}',
      of_split,
    )


def pairs_of(value: Any, where: str) -> list[Pair]:
  """The pairs of the value of one line of JSON; errors call it `where`.

  Raises:
    ValueError: The value is no example.
  """
  keys = set(value) if isinstance(value, dict) else set()
  if 'messages' in keys and not keys & {'inputs', 'targets'}:
    return conversation(value['messages'], where)
  if not {'inputs', 'targets'} <= keys or 'messages' in keys:
    raise InputError(
      f"{where} is no object with 'inputs' and 'targets', or with 'messages'; "
      f'it has {sorted(keys) if keys else type(value).__name__}'
    )
  for key in ('inputs', 'targets'):
    check_text(value[key], f'{where}: {key}')
  return [(value['inputs'], value['targets'])]


def conversation(messages: Any, where: str) -> list[Pair]:
  """The pairs of a conversation: all messages before an answer, and the answer.

  Each message before an answer is written in lines of its own, as
  `user: Hello`. An answer whose `weight` is 0 makes no pair. Errors call the
  conversation `where`.

  Raises:
    ValueError: The messages are no conversation with an answer.
  """
  if not isinstance(messages, list):
    raise InputError(f'{where}: messages are no list')
  pairs, before = [], []
  for number, message in enumerate(messages):
    entry = f'{where}: messages[{number}]'
    if not isinstance(message, dict) or not {'role', 'content'} <= set(message):
      raise InputError(f"{entry} is no object with 'role' and 'content'")
    role, content = message['role'], message['content']
    if role not in ROLES:
      raise InputError(f'{entry}: {unknown("role", role, ROLES)}')
    check_text(content, f'{entry}.content')
    weight = message.get('weight')
    allowed = (0, 1) if role == _ANSWERS else ()
    if weight is not None and (
      type(weight) is not int or weight not in allowed
    ):
      raise InputError(
        f'{entry}.weight={weight!r:.80}: only an answer has one, 0 or 1'
      )
    if role == _ANSWERS:
      if not before:
        raise InputError(f'{entry} is an answer, and nothing precedes it')
      if weight != 0:
        pairs.append(('\n'.join(before), content))
    before.append(f'{role}: {content}')
  if not pairs:
    raise InputError(
      f'{where}: no message is of role {_ANSWERS!r}, with a weight other than 0'
    )
  return pairs
