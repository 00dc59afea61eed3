"""The letters of all array shapes, and the types that are annotated with them.

| | meaning | | meaning |
|---|---|---|---|
| B | sequences in a batch | K | experts selected per token |
| T | tokens per sequence | C | capacity: slots per expert and group |
| G | groups, routed independently | M | model width |
| S | tokens per group; G*S = B*T | F | hidden width of an expert or FFN |
| E | experts | H, D | attention heads, head width |
| L | layers | V | vocabulary |

R is the number of rows that an expert multiplies (G*C). A type `Float32`
requires float32 whatever the model's dtype is; `Float` takes any width.
"""

from typing import Any

from jaxtyping import (
  Array,
  BFloat16,
  Bool,
  Float,
  Float32,
  Int,
  Int8,
  Int32,
  Key,
  Shaped,
  UInt8,
  UInt16,
  UInt32,
)

PRNGKey = Key[Array, '']
# Type of a field of a registered dataclass: an array, or, in a tree of the same
# form, what stands for it, such as a shape or a sharding.
Leaf = Any

__all__ = [
  'Array',
  'BFloat16',
  'Bool',
  'Float',
  'Float32',
  'Int',
  'Int8',
  'Int32',
  'Key',
  'Leaf',
  'PRNGKey',
  'Shaped',
  'UInt8',
  'UInt16',
  'UInt32',
]
