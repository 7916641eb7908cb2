"""The formulations of the layers: one set of parameters, one interface, and more than one way to compute it.

A module holds parameters and says its equations in `__call__`, after one question to this folder: is there a function
that computes it as a whole, by platform, size, dtype and by what is asked for (`ModelConfig.inner`)? Nothing else in
`models` asks for the platform. What a formulation does not cover is left to the equations, which the log says once.
"""
