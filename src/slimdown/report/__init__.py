"""Results in, pages out: the only room that writes reports, and it reads results only."""

from slimdown.report.compare import deployed_targets as deployed_targets
from slimdown.report.results import read_results as read_results
from slimdown.report.results import write_report as write_report
from slimdown.report.terminal import render_terminal as render_terminal
