"""Bidirectional linear attention: models that train in parallel and run as an RNN, with the same outputs."""

__version__ = "0.1.0"
