"""Synthetic data: phantoms and the two-disc toy, as cohorts of NIfTI files."""

from medconstraints.synthetic.discs import make_disc, make_discs
from medconstraints.synthetic.pairs import write_pairs
from medconstraints.synthetic.phantoms import make_cohort, make_phantom

__all__ = ["make_cohort", "make_disc", "make_discs", "make_phantom", "write_pairs"]
