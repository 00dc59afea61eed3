"""The progress of a run as displayed on a terminal and elsewhere."""

import contextlib
import io
import os
import re
import threading

from moe_jax.runs import progress as progress_lib
from moe_jax.runs.progress import Progress


class Clock:
  """A clock whose seconds are set by the test."""

  now = 0.0

  def __call__(self):
    return self.now


@contextlib.contextmanager
def terminal():
  """An open terminal, and a list that gets its text once it is closed."""
  master, slave = os.openpty()
  shown = []

  def read():
    # Reading at a terminal's end raises an error on Linux and returns nothing
    # elsewhere.
    with contextlib.suppress(OSError):
      while data := os.read(master, 4096):
        shown.append(data)

  reader = threading.Thread(target=read)
  reader.start()
  with open(slave, 'w') as out:
    yield out, shown
  reader.join()
  os.close(master)
  shown[:] = [b''.join(shown).decode()]


def test_plain_lines_have_the_facts():
  out, clock = io.StringIO(), Clock()
  # The run resumes at step 1,000. Compiling takes 60 s, and then 100 steps take
  # 10 s.
  with Progress(3000, 1000, out, clock) as progress:
    progress.message('resumed from step 1000 [b]')
    clock.now = 60.0
    progress.update(1100, dict(loss=2.34567, tokens_per_second=12345.6))
    clock.now = 70.0
    progress.update(
      1200, dict(loss=2.0, tokens_per_second=999.5, drop_rate=0.0123)
    )
    # The run is slower now: 300 steps in 80 s, so that 1,600 more take 426.7 s.
    clock.now = 140.0
    progress.update(
      1400, dict(loss=float('nan'), tokens_per_second=5.0, drop_rate=0.0)
    )
  assert out.getvalue().splitlines() == [
    'resumed from step 1000 [b]',
    'step 1,100/3,000  loss 2.3457 nats/token  12,346 tokens/s',
    'step 1,200/3,000  loss 2.0000 nats/token  1,000 tokens/s'
    '  dropped 1.2%  0:03:00 left',
    'step 1,400/3,000  loss nan nats/token  5 tokens/s'
    '  dropped 0.0%  0:07:07 left',
  ]


def test_time_left_follows_the_speed_of_late():
  out, clock = io.StringIO(), Clock()
  progress = Progress(1000, 0, out, clock)
  # After 30 updates at 1 s a step and 30 at 2 s the first are forgotten.
  for step in range(1, 61):
    clock.now += 1 if step <= 30 else 2
    progress.update(step, dict(loss=1.0, tokens_per_second=1.0))
  assert out.getvalue().splitlines()[29].endswith('0:16:10 left')  # 970 s
  assert out.getvalue().splitlines()[59].endswith('0:31:20 left')  # 1,880 s


def test_a_terminal_gets_a_bar_that_messages_do_not_break(monkeypatch):
  monkeypatch.setenv('TERM', 'xterm')
  monkeypatch.setenv('COLUMNS', '80')
  clock = Clock()
  with terminal() as (out, chunks), Progress(3000, 100, out, clock) as progress:
    progress.update(200, dict(loss=2.5, tokens_per_second=12345.6))
    clock.now = 10.0
    progress.update(
      300, dict(loss=2.25, tokens_per_second=12345.6, drop_rate=0.0123)
    )
    progress.message('saved [bold]step 300')
    with progress.evaluating(300, 'capacity_2'):
      pass
    clock.now = 20.0
    progress.update(3000, dict(loss=2.0, tokens_per_second=1.0))
  (shown,) = chunks
  rows = re.split(r'[\r\n]+', re.sub(r'\x1b\[[0-9;?]*[A-Za-z]', '', shown))
  assert 'saved [bold]step 300' in [row.rstrip() for row in rows]
  bars = [row for row in rows if '━' in row]
  assert any('300/3000' in bar and '0:04:30 left' in bar for bar in bars)
  assert any('evaluating capacity_2' in bar for bar in bars)
  assert '3000/3000' in bars[-1] and 'loss 2.0000' in bars[-1]
  assert all(len(row) <= 80 for row in rows)


def test_a_line_names_an_evaluation_that_takes_long(monkeypatch):
  out, is_written = io.StringIO(), threading.Event()
  monkeypatch.setattr(progress_lib, '_LONG_SECONDS', 0.01)
  with Progress(3000, 100, out) as progress:
    message = progress.message
    progress.message = lambda text: (message(text), is_written.set())
    with progress.evaluating(200, 'capacity_2'):
      assert is_written.wait(20)
    assert out.getvalue() == 'step 200: evaluating capacity_2\n'
    monkeypatch.setattr(progress_lib, '_LONG_SECONDS', 30.0)
    with progress.evaluating(300, 'capacity_2'):
      pass
  assert 'step 300' not in out.getvalue()


def test_a_dumb_terminal_gets_lines(monkeypatch):
  monkeypatch.setenv('TERM', 'dumb')
  with terminal() as (out, shown), Progress(10, 0, out) as progress:
    progress.update(5, dict(loss=1.0, tokens_per_second=2.0))
  assert shown == ['step 5/10  loss 1.0000 nats/token  2 tokens/s\r\n']
