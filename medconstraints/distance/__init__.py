"""Distance maps: exact signed distances of labels, anisotropic, in millimetres; and distances along an image."""

from medconstraints.distance.geodesic import geodesic_distance, grow_label, signed_geodesic_distance
from medconstraints.distance.maps import signed_distance, signed_distance_map
from medconstraints.distance.measures import Euclidean, Geodesic
from medconstraints.distance.provenance import check_not_resampled

__all__ = [
    "Euclidean",
    "Geodesic",
    "check_not_resampled",
    "geodesic_distance",
    "grow_label",
    "signed_distance",
    "signed_distance_map",
    "signed_geodesic_distance",
]
