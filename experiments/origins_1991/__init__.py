"""The first gated experts, of 1991: data, model and training.

`vowels.py` has the data, `mixture.py` the model and its three errors, and
`descent.py` the training, the measures and the runs of the study
`jacobs_table1.py`.
"""
