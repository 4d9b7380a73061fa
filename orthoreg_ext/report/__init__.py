"""Reports on one page that needs nothing else: of a run of the command, or of a prune."""

from .result import write_report
from .run import report_html
from .scores import ScoreCounts, ScoreRecorder

__all__ = ["ScoreCounts", "ScoreRecorder", "report_html", "write_report"]
