"""Experts of model libraries: how they are found (`find`, once, when a model is enabled) and how they are run (`run`, at each call).

`usable` decides what may be read now, `sandbox` runs a model's code without a trace, `transformers_facts` knows the releases.
"""
