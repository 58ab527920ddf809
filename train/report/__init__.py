"""A run as one page: `report.html`, made from nothing but the run directory."""

from thornback.train.report.changes import Change, before_and_after
from thornback.train.report.page import write_report
from thornback.train.report.record import RunRecord, read_run

__all__ = ["Change", "RunRecord", "before_and_after", "read_run", "write_report"]
