"""The program that renders one chat template, in a process of its own.

`chat.py` starts it as `python -IB chat_child.py FOLDER`, with the folder in
which Jinja is installed. It imports nothing of this package. It reads a list of
template, variables and limits as JSON, and prints an object with 'text' or
'error'.
"""

import contextlib
import datetime
import json
import resource
import sys


def main() -> None:
  """Renders the template that is read, and prints the answer."""
  sys.path.append(sys.argv[1])  # last, so that it hides no standard module
  import jinja2
  from jinja2 import sandbox

  def refuse(message: str):
    raise jinja2.TemplateError(message)

  def now(form: str) -> str:
    return datetime.datetime.now().strftime(form)

  extensions = ['jinja2.ext.loopcontrols']
  environment = sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=extensions
  )
  # Jinja's own filter would escape the text for HTML.
  environment.filters['tojson'] = lambda value, indent=None: json.dumps(
    value, ensure_ascii=False, indent=indent
  )
  environment.globals |= {'raise_exception': refuse, 'strftime_now': now}
  template, variables, limits = json.load(sys.stdin)
  _limit(resource.RLIMIT_FSIZE, 0)
  _limit(resource.RLIMIT_CORE, 0)
  _limit(resource.RLIMIT_AS, limits['memory_bytes'])
  _limit(resource.RLIMIT_CPU, 1 + limits['cpu_seconds'])
  try:
    text = environment.from_string(template).render(**variables)
    answer = {'text': text}
    if len(text) > limits['text_length']:
      answer = {'error': f'it gives a text of {len(text)} characters'}
  except MemoryError:
    most = limits['memory_bytes'] // 2**20
    answer = {'error': f'it needs more than {most} MiB of memory'}
  except RecursionError:
    answer = {'error': 'it is nested too deeply, or calls itself'}
  except Exception as error:  # Jinja, or a call in the template, raises any
    message = ' '.join(str(error)[:300].split())
    shown = ''.join(c if c.isprintable() else '?' for c in message)
    answer = {'error': shown or type(error).__name__}
  print(json.dumps(answer))


def _limit(resource_id: int, most: int) -> None:
  """Sets a soft limit on a resource, where the system can limit it."""
  with contextlib.suppress(OSError, ValueError):
    hard = resource.getrlimit(resource_id)[1]
    if hard != resource.RLIM_INFINITY:
      most = min(most, hard)
    resource.setrlimit(resource_id, (most, hard))


if __name__ == '__main__':
  main()
