"""Engines and what they take their batches from: inference that survives bad files, targets of the losses."""

from medconstraints.engines.inference import TolerantDataset, TolerantEvaluator, collate_or_failure
from medconstraints.engines.prepare_batch import PrepareBatchTargets

__all__ = ["PrepareBatchTargets", "TolerantDataset", "TolerantEvaluator", "collate_or_failure"]
