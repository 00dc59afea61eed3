"""Scalars as the records of TensorBoard's event files.

tensorboardX's own writer is not used: on a full disk its thread dies, and its
full queue then blocks the training loop for ever. Not here: the files
(`metrics.py`).
"""

import struct
import time
from collections.abc import Mapping

# Classes that protobuf makes at run time are unknown to type checkers.
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore
from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore
from tensorboardX.record_writer import masked_crc32c


def beginning(first_step: int) -> list[bytes]:
  """The first records of a file, whose scalars are those from a step on.

  TensorBoard drops the values that earlier files have for these steps.
  """
  start = SessionLog(status=SessionLog.START)
  return [
    _record(Event(file_version='brain.Event:2')),
    _record(Event(step=first_step, session_log=start)),
  ]


def scalars(step: int, values: Mapping[str, float]) -> bytes:
  """The record of the scalars of one step, by name."""
  summary = Summary(
    value=[
      Summary.Value(tag=key, simple_value=value)
      for key, value in values.items()
    ]
  )
  return _record(Event(step=step, summary=summary))


def _record(event: Event) -> bytes:
  """An event as a TFRecord: length and its checksum, data and its checksum."""
  event.wall_time = time.time()
  data = event.SerializeToString()
  length = struct.pack('<Q', len(data))
  return b''.join(
    [
      length,
      struct.pack('<I', masked_crc32c(length)),
      data,
      struct.pack('<I', masked_crc32c(data)),
    ]
  )
