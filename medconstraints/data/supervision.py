"""Which items of a datalist are labelled in full, and the number of each: what hybrid training and Lagrangians need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["number_items"]


def number_items(
    items: Sequence[dict[str, Any]], *, fully_labelled: int = 0, patient_key: str = "patient"
) -> list[dict[str, Any]]:
    """Items with their number under "index", and under "fully_labelled" whether their whole label may be used.

    Hybrid training (Kervadec 2020, section 2.4.3) replaces the weak labels of n patients by full ones: transforms that
    make weak labels keep the whole label of such an item, those that make bounds leave it free.

    Args:
        items: entries of a datalist.
        fully_labelled: n, patients that are labelled in full: the first n different values of `patient_key`, or the
            first n items where they do not name a patient.
        patient_key: key of the patient's name.

    Raises:
        ValueError: n is negative, or more than there are.

    Example:
        >>> [item["fully_labelled"] for item in number_items([{"image": "a"}, {"image": "b"}], fully_labelled=1)]
        [True, False]
    """
    names = [str(item.get(patient_key, f"item {number}")) for number, item in enumerate(items)]
    patients = list(dict.fromkeys(names))
    if fully_labelled != int(fully_labelled) or not 0 <= fully_labelled <= len(patients):
        raise ValueError(
            f"fully_labelled: expected an integer 0..{len(patients)}, the number of patients, got {fully_labelled!r}."
        )
    chosen = set(patients[: int(fully_labelled)])
    return [
        {**item, "index": number, "fully_labelled": name in chosen}
        for number, (item, name) in enumerate(zip(items, names, strict=True))
    ]
