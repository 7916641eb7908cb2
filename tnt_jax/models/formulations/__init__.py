"""The formulations of the layers: one set of parameters, one interface, and more than one way to compute it.

A module holds parameters and says its equations; a function of this folder chooses how they are computed, by platform,
size, dtype and by what is asked for (`ModelConfig.inner`). Nothing else in `models` asks for the platform. What a
formulation does not cover falls back to the equations, which the log says once.
"""
