"""The program that renders chat templates, in a process of its own.

`chat.py` starts it as `python -I chat_child.py FD FOLDER...`, with a socket and
the folders in which Jinja is installed. It imports nothing of this package. A
request is a JSON object with 'template', 'variables' and 'limits', preceded by
its length; the answer is an object with 'text' or 'error'.
"""

import contextlib
import datetime
import json
import os
import resource
import select
import signal
import struct
import sys

LENGTH = struct.Struct('>Q')
_ORPHANED_SECONDS = 5  # between a waiting process's looks for its parent
_SHOWN = 300  # characters of a template's own message


def main() -> None:
  """Answers requests until the parent closes the socket or is gone."""
  descriptor, *folders = sys.argv[1:]
  # These come last, so that they cannot hide the standard library.
  sys.path += folders
  import jinja2
  from jinja2 import sandbox

  environment = _environment(jinja2, sandbox)
  # Modules that are imported later would be written as bytecode, which the
  # limit on files turns into a signal that ends the process.
  sys.dont_write_bytecode = True
  for limit in (resource.RLIMIT_FSIZE, resource.RLIMIT_CORE):
    _limit(limit, 0)
  signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
  parent = os.getppid()
  while request := _receive(int(descriptor), parent):
    answer = _answer(environment, request)
    with open(int(descriptor), 'wb', closefd=False) as out:
      out.write(LENGTH.pack(len(answer)) + answer)


def _environment(jinja2, sandbox):
  environment = sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=['jinja2.ext.loopcontrols'],
  )

  def refuse(message: str):
    raise jinja2.TemplateError(message)

  environment.filters['tojson'] = _to_json
  environment.globals['raise_exception'] = refuse
  environment.globals['strftime_now'] = _now
  return environment


def _now(form: str) -> str:
  return datetime.datetime.now().strftime(form)


def _to_json(value, indent=None) -> str:
  # Jinja's own filter would escape the text for HTML.
  return json.dumps(value, ensure_ascii=False, indent=indent)


def _receive(descriptor: int, parent: int) -> bytes:
  """The next request; empty if there is none any more."""
  poll = select.poll()  # `select.select` fails above 1024 open files
  poll.register(descriptor, select.POLLIN)
  while not poll.poll(1000 * _ORPHANED_SECONDS):
    if os.getppid() != parent:
      return b''
  with open(descriptor, 'rb', closefd=False) as file:
    header = file.read(LENGTH.size)
    return file.read(*LENGTH.unpack(header)) if header else b''


def _answer(environment, request: bytes) -> bytes:
  """The text of a conversation or the reason why there is none, as JSON."""
  fields = json.loads(request)
  limits = fields['limits']
  _limit(resource.RLIMIT_AS, limits['memory_bytes'])
  used = resource.getrusage(resource.RUSAGE_SELF)
  spent = int(used.ru_utime + used.ru_stime)
  _limit(resource.RLIMIT_CPU, spent + 1 + limits['cpu_seconds'])
  try:
    template = environment.from_string(fields['template'])
    answer = {'text': template.render(**fields['variables'])}
    length = len(answer['text'])
    if length > limits['text_length']:
      answer = {'error': f'it gives a text of {length} characters'}
  except MemoryError:
    most = limits['memory_bytes'] // 2**20
    answer = {'error': f'it needs more than {most} MiB of memory'}
  except RecursionError:
    answer = {'error': 'it is nested too deeply, or calls itself'}
  except Exception as error:  # Jinja, or a call in the template, raises any
    message = ' '.join(str(error)[:_SHOWN].split())
    shown = ''.join(c if c.isprintable() else '?' for c in message)
    answer = {'error': shown or type(error).__name__}
  return json.dumps(answer).encode()


def _limit(resource_id: int, most: int) -> None:
  """Sets a soft limit, where the system has it."""
  with contextlib.suppress(OSError, ValueError):
    hard = resource.getrlimit(resource_id)[1]
    if hard != resource.RLIM_INFINITY:
      most = min(most, hard)
    resource.setrlimit(resource_id, (most, hard))


if __name__ == '__main__':
  main()
