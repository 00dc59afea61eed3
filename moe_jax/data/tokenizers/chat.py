"""Text of conversations, by the Jinja template that a model comes with.

A template is code from a download. It runs in Jinja's sandbox, where it has
access only to the values that are given to it.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import sandbox

Message = Mapping[str, Any]


def render(
  template: str,
  messages: Sequence[Message],
  *,
  names: Mapping[str, str],
  add_generation_prompt: bool = True,
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
    add_generation_prompt: Whether the text ends with the begin of the model's
      turn.
    **variables: Other variables that the template reads.

  Raises:
    ValueError: The template is wrong, or refuses the messages.
  """
  environment = sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=['jinja2.ext.loopcontrols'],
  )
  environment.filters['tojson'] = _to_json
  environment.globals['raise_exception'] = _raise
  environment.globals['strftime_now'] = _now
  tokens = {f'{role}_token': name for role, name in names.items()}
  try:
    return environment.from_string(template).render(
      messages=list(messages),
      add_generation_prompt=add_generation_prompt,
      **tokens,
      **variables,
    )
  except (jinja2.TemplateError, TypeError) as error:
    raise ValueError(f'chat template: {error}') from error


def _raise(message: str):
  raise jinja2.TemplateError(message)


def _now(form: str) -> str:
  return datetime.datetime.now().strftime(form)


def _to_json(value: Any, indent: int | None = None) -> str:
  # Jinja's own filter would escape the text for HTML.
  return json.dumps(value, ensure_ascii=False, indent=indent)
