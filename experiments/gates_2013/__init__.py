"""The deep mixture of experts, of 2013: model, data and measures of gates.

`digits.py` has the data, `deep_moe.py` the model and its balancing constraint,
and `training.py` the options and the runs of the study `eigen_2013.py`.
`measures.py` is what it shows of gates.
"""
