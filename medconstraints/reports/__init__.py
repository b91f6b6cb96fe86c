"""Scores, tables, pictures and pages of a run. One module each; none is imported before it is asked for."""

__all__ = ["curves", "datalist", "evaluation", "montage", "page", "tables", "volumes"]
