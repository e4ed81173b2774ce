"""Trained models at work: predictions in any form, of inputs in memory or of one sequence that does not fit."""

from lba_exp.inference.predictor import Prediction, Predictor, load
from lba_exp.inference.streaming import Stream

__all__ = ["Prediction", "Predictor", "Stream", "load"]
