"""Distance maps: exact signed distances of labels, anisotropic, in millimetres."""

from medconstraints.distance.geodesic import signed_geodesic_distance
from medconstraints.distance.maps import signed_distance, signed_distance_map
from medconstraints.distance.provenance import check_not_resampled

__all__ = ["check_not_resampled", "signed_distance", "signed_distance_map", "signed_geodesic_distance"]
