"""Text of conversations, by the Jinja template that a model comes with.

A template is code from a download. It runs in Jinja's sandbox, where it has
access only to the values that are given to it, and in a process of its own
(`chat_child.py`) with bounds on time, memory and text, as an endless loop or
string could not be stopped in this process. The other process takes about
0.1 s.
"""

import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from moe_jax.errors import InputError

Message = Mapping[str, Any]
PROGRAM = pathlib.Path(__file__).with_name('chat_child.py')
# The only environment variables that a template's process can see.
_ENVIRONMENT = ('TZ', 'LD_LIBRARY_PATH', 'DYLD_LIBRARY_PATH')


class Limits(NamedTuple):
  """The bounds for one conversation; `text_length` counts characters."""

  cpu_seconds: int = 5
  wall_seconds: float = 30.0
  memory_bytes: int = 2**29
  text_length: int = 2**23


def render(
  template: str,
  messages: Sequence[Message],
  *,
  names: Mapping[str, str],
  add_generation_prompt: bool = True,
  limits: Limits = Limits(),
  **variables: Any,
) -> str:
  """The text of a conversation, special tokens spelled out.

  The content of a message is inserted unchanged, so a message that spells a
  special token becomes that token, as in transformers.

  Args:
    template: Template in Jinja's language, with `raise_exception`,
      `strftime_now`, `tojson`, `break` and `continue`.
    messages: Mappings, each with 'role' and 'content'.
    names: Spellings of special tokens by role, {'bos': '<s>'}; the template
      reads them as `bos_token`.
    add_generation_prompt: Whether the text ends with the beginning of the
      model's turn.
    limits: The bounds on time, memory and text.
    **variables: Other variables that the template reads, JSON values like the
      messages.

  Raises:
    ValueError: The template is wrong, refuses the messages, or goes beyond the
      bounds; or a value is not of JSON.
  """
  values = {
    'messages': [dict(message) for message in messages],
    'add_generation_prompt': add_generation_prompt,
    **{f'{role}_token': name for role, name in names.items()},
    **variables,
  }
  try:
    request = json.dumps([template, values, limits._asdict()])
  except (TypeError, ValueError, RecursionError) as error:
    raise InputError(
      f'messages and variables of a chat have to be JSON values: {error}'
    ) from None
  spec: Any = importlib.util.find_spec('jinja2')
  folder = str(pathlib.Path(spec.origin).parents[1])
  try:
    child = subprocess.run(
      [sys.executable, '-IB', str(PROGRAM), folder],
      input=request.encode(),
      capture_output=True,
      timeout=limits.wall_seconds,
      env={k: os.environ[k] for k in _ENVIRONMENT if k in os.environ},
      cwd='/',
      start_new_session=True,  # Ctrl-C is for this process alone
      check=False,
    )
  except subprocess.TimeoutExpired:
    reason = f'no answer in {limits.wall_seconds:g} s'
    raise InputError(f'chat template: {reason}') from None
  if child.returncode == -signal.SIGXCPU:
    reason = f'it takes more than {limits.cpu_seconds} s of processor time'
  elif child.returncode:
    reason = f'its process ended with status {child.returncode}'
  else:
    text, reason = json.loads(child.stdout)
    if not reason:
      return text
  raise InputError(f'chat template: {reason}')
