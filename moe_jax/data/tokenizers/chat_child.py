"""The program that renders one chat template, in a process of its own.

`chat.py` starts it as `python -IB chat_child.py FOLDER`, with the folder in
which Jinja is installed. The program imports nothing of this package. It reads
[template, variables, limits] as JSON and prints [text, reason] as JSON: the
text and '', or '' and the reason why there is no text.
"""

import contextlib
import datetime
import json
import resource
import sys


def main() -> None:
  """Reads a template and its variables, renders it and prints the result."""
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
  text = reason = ''
  try:
    text = environment.from_string(template).render(**variables)
    if len(text) > limits['text_length']:
      text, reason = '', f'it gives a text of {len(text)} characters'
  except MemoryError:
    most = limits['memory_bytes'] // 2**20
    reason = f'it needs more than {most} MiB of memory'
  except RecursionError:
    reason = 'it is nested too deeply, or calls itself'
  except Exception as error:  # Jinja, or a call in the template, raises any
    message = ' '.join(str(error)[:300].split())
    reason = ''.join(c if c.isprintable() else '?' for c in message)
    reason = reason or type(error).__name__
  print(json.dumps([text, reason]))


def _limit(resource_id: int, most: int) -> None:
  """Sets the soft limit of a resource to `most`, where the system can."""
  with contextlib.suppress(OSError, ValueError):
    hard = resource.getrlimit(resource_id)[1]
    if hard != resource.RLIM_INFINITY:
      most = min(most, hard)
    resource.setrlimit(resource_id, (most, hard))


if __name__ == '__main__':
  main()
