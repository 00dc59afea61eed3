"""State of each process as process 0 knows it, and the reason to end a run."""

import dataclasses
import time

from moe_jax.distributed import Timeouts


@dataclasses.dataclass
class Peer:
  """State of a process.

  Attributes:
    num_stages: Number of stages that the process has begun.
    stage: Name of the last stage: 'step 3'.
    last_heard: Time of its last message, in seconds of the monotonic clock.
    is_done: Whether it has reached the end and waits for the others.
  """

  num_stages: int = 0
  stage: str = 'the start'
  last_heard: float = dataclasses.field(default_factory=time.monotonic)
  is_done: bool = False


class Peers:
  """States of all processes of a run, by number."""

  def __init__(self, size: int, timeouts: Timeouts):
    """Begins with `size` processes that have just started."""
    self._peers = {i: Peer() for i in range(size)}
    self._silence = timeouts.heartbeat_timeout_seconds
    self._stall = timeouts.stall_timeout_seconds
    self._last_move = time.monotonic()
    self._total_stages = 0

  def __getitem__(self, index: int) -> Peer:
    return self._peers[index]

  @property
  def all_done(self) -> bool:
    """Whether every process has reached the end."""
    return all(peer.is_done for peer in self._peers.values())

  def end_reason(self) -> str | None:
    """The reason for which all processes have to end; None if there is none.

    Either a process is silent, or none has begun a new stage for too long.
    """
    now = time.monotonic()
    awake = {i: p for i, p in self._peers.items() if not p.is_done}
    for index, peer in awake.items():
      if now - peer.last_heard > self._silence:
        return (
          f'process {index} does not answer, for {now - peer.last_heard:.0f} s'
          f'; it had got to {peer.stage}'
        )
    total_stages = sum(peer.num_stages for peer in self._peers.values())
    if total_stages != self._total_stages:
      self._total_stages, self._last_move = total_stages, now
    if not self._stall or now - self._last_move <= self._stall or not awake:
      return None
    return f'nothing moved for {self._stall} s; {self._behind(awake)}'

  def _behind(self, awake: dict[int, Peer]) -> str:
    """Text that names the processes with the fewest stages, and their stage."""
    least = min(peer.num_stages for peer in awake.values())
    behind = [i for i, peer in awake.items() if peer.num_stages == least]
    if len(behind) == len(self._peers):
      who = 'no process is behind: all have'
    elif len(behind) > 1:
      who = f'processes {", ".join(map(str, behind))} are behind: they have'
    else:
      who = f'process {behind[0]} is stuck: it has'
    return f'{who} got to {awake[behind[0]].stage}'
