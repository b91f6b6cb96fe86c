"""Constraint losses, transforms and engines for medical image segmentation with few or weak labels."""

from pathlib import Path

from medconstraints.version import __version__

__all__ = ["__version__"]

# In a checkout `transforms/` stands beside this package, not inside it; an install puts it inside. When Python picks
# up the checkout because it is the current folder, this entry lets `medconstraints.transforms` be found there too.
_parent = Path(__file__).resolve().parent.parent
if not (_parent / "medconstraints" / "transforms").is_dir() and (_parent / "transforms" / "__init__.py").is_file():
    __path__.append(str(_parent))
