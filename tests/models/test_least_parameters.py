"""Parameters counted by arithmetic are no more than there are, and nearly all.

The least memory of a run is refused by this count before a model is traced.
"""

import dataclasses

import pytest

from moe_jax import models
from moe_jax.analysis.counts import sized_parameters
from moe_jax.layers.attention import LatentOptions
from moe_jax.layers.experts import SharedExpertOptions
from moe_jax.layers.positions import Learned
from moe_jax.models.embeddings import EmbeddingOptions

TEXT = {'vocab_size': 31, 'width': 24, 'num_layers': 5}
MOE = dataclasses.replace(models.DecoderOptions(**TEXT).moe, num_experts=3)


def share(options):
  """The counted part of all parameters."""
  num_parameters = sum(p.size for p in sized_parameters(options.build()))
  return options.least_parameters() / num_parameters


@pytest.mark.parametrize(
  'options',
  [
    models.DecoderOptions(
      **TEXT,
      attention=LatentOptions(kv_rank=16),
      moe=dataclasses.replace(MOE, num_experts=0),
    ),
    models.DecoderOptions(
      **TEXT,
      attention=LatentOptions(query_rank=8, kv_rank=16),
      embedding=EmbeddingOptions(tie=False),
      positions=Learned(17),
      moe=dataclasses.replace(MOE, shared_expert=SharedExpertOptions(99)),
    ),
    models.EncoderDecoderOptions(**TEXT, moe=MOE),
    models.LstmLmOptions(**TEXT, moe=MOE),
  ],
  ids=lambda options: type(options).__name__,
)
def test_the_count_of_small_models(options):
  assert 0.85 <= share(options) <= 1
