"""Labelled examples that are no text."""

import abc
from typing import NamedTuple

import numpy as np

from moe_jax.shapes import Float32, Int32


class Examples(NamedTuple):
  features: Float32[np.ndarray, 'N ...']
  labels: Int32[np.ndarray, ' N']


class ClassSource(abc.ABC):
  name: str
  identity: str
  classes: tuple[str, ...]

  @abc.abstractmethod
  def examples(self, split: str) -> Examples: ...

  def jittered(
    self, features: Float32[np.ndarray, 'N ...'], generator: np.random.Generator
  ) -> Float32[np.ndarray, 'N ...']:
    del generator
    return features
