"""The first gated experts, of 1991: model, data and table of the paper.

`vowels.py` has the data, `mixture.py` the model and its three errors,
`descent.py` the training, the measures and the runs of the study
`jacobs_table1.py`, and `rows.py` the systems, columns and claims of its table.
"""
