"""The loss of a lean model, from hidden states and the output projection's weight.

lean_loss.py     the forward of a model with labels
late_head.py     the module that stands for the output projection in it
projection.py    the operands of the logits
late_logits.py   logits that are computed when they are read
late_cache.py    a cache of keys and values that is made when it is read
obstacles.py     the reasons why a model computes its loss from logits
"""
