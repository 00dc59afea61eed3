"""PyTorch's fused attention, timed in a process of its own.

In one process its threads and those of XLA disturb each other. The process
takes its turn when it is asked to, and sleeps between.
"""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection

# B, T, H and D of a case, and whether rows hold several documents.
Case = tuple[tuple[int, int, int, int], bool]


@contextmanager
def turns(cases: Sequence[Case]) -> Iterator[Callable[[Case], None]]:
  """A function that runs a case once, forward and backward, and waits for it.

  Raises:
    SystemExit: torch is not installed.
  """
  try:
    import torch
  except ImportError as error:
    raise SystemExit(
      f"--peer needs the 'experiments' extra: {error}"
    ) from error
  threads = torch.get_num_threads()
  context = multiprocessing.get_context('spawn')
  here, there = context.Pipe()
  process = context.Process(
    target=_serve, args=(there, list(cases), threads), daemon=True
  )
  process.start()
  there.close()

  def run(case):
    here.send(case)
    here.recv()

  try:
    yield run
  finally:
    here.close()
    process.join()


def _serve(connection: Connection, cases: list[Case], threads: int) -> None:
  import torch

  torch.set_num_threads(threads)
  programs = {case: _program(*case) for case in cases}
  while True:
    try:
      case = connection.recv()
    except EOFError:
      return
    programs[case]()
    connection.send(None)


def _program(shape, packed):
  import torch

  B, T, H, D = shape
  torch.manual_seed(0)
  query, key, value, toward = (torch.randn(B, T, H, D) for _ in range(4))
  inputs = [x.requires_grad_() for x in (query, key, value)]
  mask = None
  if packed:
    ids = torch.arange(T).expand(B, T) // (-(-T // 3))
    mask = ids[:, None, :, None] == ids[:, None, None, :]
    mask = mask & torch.ones(T, T, dtype=torch.bool).tril()

  def run():
    y = torch.nn.functional.scaled_dot_product_attention(
      *(x.transpose(1, 2) for x in inputs),
      attn_mask=mask,
      is_causal=mask is None,
    )
    torch.autograd.grad(y.transpose(1, 2), inputs, toward)

  return run
