"""Options that several routers have, each declared once.

Every router that has an option sets a field to the constant here; the name of
the field is that of the constant in lower case.
"""

from typing import Any

from moe_jax.config import option
from moe_jax.routing import aux_losses
from moe_jax.routing import token_choice_rule as rule
from moe_jax.routing.balance_bias import SCORES
from moe_jax.routing.given_choice_rule import GIVEN_PRIORITIES


def loss_weight(default: float, loss: str) -> Any:
  """The option of a loss's weight, whose help text calls the loss `loss`."""
  return option(
    default,
    f'Weight of the {loss}; 0.0 leaves it out.',
    minimum=0,
    same_function=True,
  )


# Options that change the logits of a router.

JITTER = option(
  0.0,
  'Noise on the input of the router in training, which is multiplied by '
  'random numbers uniform in [1 - jitter, 1 + jitter] (ST-MoE, '
  'arXiv:2202.08906 section 3.2); 0.0: no noise.',
  minimum=0,
  below=1,
  same_function=True,
)
USE_BIAS = option(
  False,
  'Whether a learned bias, which starts at zero, is added to the router '
  'logits.',
)

# Options on gates and slots.

GATES = option(
  'raw',
  "Gates, the weights of a token's chosen experts: 'raw' is the softmax over "
  "all experts (Switch); 'renormalized' makes the K gates sum to one before "
  'any choice is dropped (GShard, ST-MoE, Mixtral); '
  "'renormalized_after_drop' makes those of served choices sum to one "
  "(praxis); 'sigmoid' is the sigmoid of each logit (Loss-Free Balancing), "
  "and 'sigmoid_renormalized' divides these by the sum of the K chosen ones "
  'plus 1e-20 (DeepSeek-V3).',
  choices=rule.GATES,
)
SLOT_PRIORITY = option(
  'token_major',
  'Order in which experts serve the choices of a group: '
  "'token_major' is token by token, each with all its choices; "
  "'choice_major' is all first choices, then all second ones (GShard); "
  "'batch_priority' is choice-major with the tokens ordered by their largest "
  'probability (V-MoE, arXiv:2106.05974). The last two let later tokens '
  'change earlier outputs.',
  choices=rule.SLOT_PRIORITIES,
)
# The slot priority of routers that have no probabilities of experts. Without
# them, tokens cannot be ordered for the value 'batch_priority'.
SLOT_PRIORITY_WITHOUT_PROBABILITY = option(
  'token_major',
  'Order in which experts serve the choices of a group: '
  "'token_major' is token by token, each with all its choices; "
  "'choice_major' is all first choices, then all second ones (GShard), which "
  'lets later tokens change earlier outputs.',
  choices=GIVEN_PRIORITIES,
)
SECOND_POLICY = option(
  'all',
  "Choices after a token's first that are sent to experts in training: "
  "'all'; 'sampled', with K=2, with probability 2 * gate (Algorithm 1 of "
  "GShard); or 'threshold', with probability gate / second_threshold "
  '(ST-MoE, section C.2).',
  choices=rule.SECOND_POLICIES,
  same_function=True,
)
SECOND_THRESHOLD = option(
  0.2,
  "Renormalised gate from which on second_policy='threshold' always sends a "
  'choice after the first.',
  above=0,
  maximum=1,
  same_function=True,
)

# Options on losses.

Z_WEIGHT = loss_weight(
  0.001,
  'z-loss, the mean squared logsumexp of the router logits (Eq. 5 of '
  'arXiv:2202.08906)',
)
IMPORTANCE_WEIGHT = loss_weight(
  0.0,
  'importance loss, the squared coefficient of variation of the summed gates '
  'of each expert (Eq. 6-7 of arXiv:1701.06538)',
)
BALANCE_WEIGHT = loss_weight(
  0.01,
  'balance loss, E times the sum over experts of their fraction of choices '
  'times their mean probability (Eq. 4 of arXiv:2101.03961)',
)
BALANCE_CHOICES = option(
  'all',
  "Choices of a token that the balance loss counts: 'all' K of them, or only "
  "the 'first' (GShard, ST-MoE).",
  choices=aux_losses.BALANCE_CHOICES,
  same_function=True,
)

# Balance losses of other sets of tokens than routing groups. Loads can be even
# in each sequence, on each device, or in a whole batch; the larger the set, the
# more an expert may specialise (arXiv:2501.11873). Several of these losses may
# count at once.

SEQUENCE_BALANCE_WEIGHT = loss_weight(
  0.0,
  'balance loss of each row of the batch by itself, whatever the groups are '
  '(Eq. 12 of arXiv:2401.06066, DeepSeekMoE; Eq. 17 of arXiv:2412.19437, '
  'V3). With a balancing bias, this loss and those of other scopes count the '
  'K best experts without bias and groups of experts (Eq. 18 there)',
)
BATCH_BALANCE_WEIGHT = loss_weight(
  0.0, 'balance loss of each batch_balance_rows rows, such as those of a device'
)
BATCH_BALANCE_ROWS = option(
  8,
  'Number of consecutive rows of the batch over which batch_balance_weight '
  'counts loads and probabilities, whatever devices a run has.',
  minimum=1,
  same_function=True,
)
GLOBAL_BALANCE_WEIGHT = loss_weight(
  0.0,
  'balance loss of the whole batch of a step, over all devices '
  '(arXiv:2501.11873); the batch must not be split into microbatches',
)
BALANCE_SCORES = option(
  'softmax',
  'Probabilities of all balance losses, that of balance_weight too: the '
  "'softmax' of the logits, or each 'sigmoid' divided by the sum of all of "
  "the token's (Eq. 19 of arXiv:2412.19437, DeepSeek-V3).",
  choices=SCORES,
  same_function=True,
)
