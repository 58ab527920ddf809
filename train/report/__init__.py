"""A run as one page: `report.html`, made from nothing but the run directory."""

from thornback.train.report.page import write_report

__all__ = ["write_report"]
