"""Text of conversations, by the Jinja template that a model comes with.

A template is code from a download. It runs in Jinja's sandbox, where it has
access only to the values that are given to it, in a process of its own
(`chat_child.py`) with bounds on time, memory and text, as a loop or a long
string would not end in this one. The process is started at the first
conversation, which takes about 0.09 s, and serves all others, each of which
takes about 0.6 ms.
"""

import atexit
import contextlib
import dataclasses
import importlib.util
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, cast

from moe_jax.data.tokenizers.chat_child import LENGTH
from moe_jax.errors import InputError

Message = Mapping[str, Any]
PROGRAM = pathlib.Path(__file__).with_name('chat_child.py')
# Modules that the program needs besides the standard library.
_MODULES = ('jinja2', 'markupsafe')
# No other variable of the environment is seen by a template's process.
_ENVIRONMENT = ('TZ', 'LD_LIBRARY_PATH', 'DYLD_LIBRARY_PATH')


@dataclasses.dataclass(frozen=True)
class Limits:
  """The bounds of one conversation.

  Attributes:
    cpu_seconds: Time of the processor.
    wall_seconds: Time until the answer is there.
    memory_bytes: The address space of the process.
    text_length: The characters of the text.
  """

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
  **variables: Any,
) -> str:
  """The text of a conversation, special tokens spelled out.

  The content of a message is inserted unchanged, so a message that spells a
  special token becomes that token, as in transformers. Threads take turns.

  Args:
    template: Template in Jinja's language, with `raise_exception`,
      `strftime_now`, `tojson`, `break` and `continue`.
    messages: Mappings, each with 'role' and 'content'.
    names: Spellings of special tokens by role, {'bos': '<s>'}; the template
      reads them as `bos_token`.
    add_generation_prompt: Whether the text ends with the beginning of the
      model's turn.
    **variables: Other variables that the template reads, JSON values like the
      messages.

  Raises:
    ValueError: The template is wrong, refuses the messages, or goes beyond the
      bounds of `Limits`; or a value is not of JSON.
  """
  tokens = {f'{role}_token': name for role, name in names.items()}
  template_values = {
    'messages': [dict(message) for message in messages],
    'add_generation_prompt': add_generation_prompt,
    **tokens,
    **variables,
  }
  return RENDERER.render(template, template_values, Limits())


class Renderer:
  """The process that renders templates; it is started when it is needed."""

  def __init__(self):
    self.forget()

  def forget(self) -> None:
    """Leaves the process alone, as a fork does with that of its parent."""
    self._lock = threading.Lock()
    self._process: subprocess.Popen[bytes] | None = None
    self._socket: socket.socket | None = None

  @property
  def pid(self) -> int | None:
    """The number of the process; None if there is none."""
    return None if self._process is None else self._process.pid

  def render(
    self, template: str, variables: Mapping[str, Any], limits: Limits
  ) -> str:
    """The text; see the function `render`."""
    fields = {
      'template': template,
      'variables': variables,
      'limits': dataclasses.asdict(limits),
    }
    try:
      request = json.dumps(fields).encode()
    except (TypeError, ValueError, RecursionError) as error:
      raise InputError(
        f'messages and variables of a chat have to be JSON values: {error}'
      ) from None
    with self._lock:
      answer = self._exchange(request, limits)
    if 'error' in answer:
      raise InputError(f'chat template: {answer["error"]}')
    return answer['text']

  def _exchange(self, request: bytes, limits: Limits) -> dict[str, str]:
    """Sends a request and receives the answer; the lock is held."""
    try:
      if self._process is None or self._process.poll() is not None:
        try:
          self._start()
        except OSError as error:
          self.stop()
          return {'error': f'{sys.executable!r} cannot be started: {error}'}
      end = time.monotonic() + limits.wall_seconds
      connection = cast(socket.socket, self._socket)
      connection.settimeout(limits.wall_seconds)
      connection.sendall(LENGTH.pack(len(request)) + request)
      (size,) = LENGTH.unpack(self._receive(LENGTH.size, end))
      # A character is at most twelve bytes of JSON.
      if size > 12 * limits.text_length + 2**12:
        raise EOFError
      return json.loads(self._receive(size, end))
    except TimeoutError:
      self.stop()
      return {'error': f'no answer in {limits.wall_seconds:g} s'}
    except (OSError, EOFError):
      return {'error': self._end_reason(limits)}
    except BaseException:
      # A half-read answer would be that of the next request.
      self.stop()
      raise

  def _receive(self, size: int, end: float) -> bytes:
    received, connection = bytearray(), cast(socket.socket, self._socket)
    while len(received) < size:
      connection.settimeout(max(end - time.monotonic(), 1e-3))
      block = connection.recv(min(size - len(received), 2**20))
      if not block:
        raise EOFError
      received += block
    return bytes(received)

  def _start(self) -> None:
    self.stop()
    own_end, child_end = socket.socketpair()
    specs: list[Any] = [importlib.util.find_spec(name) for name in _MODULES]
    folders = [str(pathlib.Path(spec.origin).parents[1]) for spec in specs]
    with child_end:
      self._process = subprocess.Popen(
        [sys.executable, '-I', str(PROGRAM), str(child_end.fileno()), *folders],
        pass_fds=[child_end.fileno()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={k: os.environ[k] for k in _ENVIRONMENT if k in os.environ},
        cwd='/',
        start_new_session=True,  # Ctrl-C is for this process alone
      )
    self._socket = own_end

  def _end_reason(self, limits: Limits) -> str:
    """The reason why the process ended; it is stopped in any case."""
    status = None
    if self._process is not None:
      with contextlib.suppress(subprocess.TimeoutExpired):
        status = self._process.wait(timeout=1)
    self.stop()
    if status == -signal.SIGXCPU:
      return f'it takes more than {limits.cpu_seconds} s of processor time'
    return f'its process ended with status {status}'

  def stop(self) -> None:
    """Ends the process, if there is one."""
    process, self._process = self._process, None
    connection, self._socket = self._socket, None
    if connection is not None:
      connection.close()
    if process is not None:
      process.kill()
      process.wait()


RENDERER = Renderer()
atexit.register(RENDERER.stop)
os.register_at_fork(after_in_child=RENDERER.forget)
