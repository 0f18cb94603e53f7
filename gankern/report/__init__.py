"""The page of a run: one self-contained HTML file, from a run directory, on which nothing is changed."""

from gankern.report.page import main, page
from gankern.report.shown import Shown, show

__all__ = ["Shown", "main", "page", "show"]
