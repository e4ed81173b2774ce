"""Measuring: time, peak memory and error of the operator's forms, beside softmax attention."""
