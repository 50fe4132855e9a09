"""Models as graphs, and the dimensions of those graphs."""

from slimdown.capture.analysis import Analysis as Analysis
from slimdown.capture.analysis import analyze as analyze
from slimdown.capture.analysis import find_tensor as find_tensor
from slimdown.capture.detectors import traceable as traceable
from slimdown.capture.detectors import whole as whole
from slimdown.capture.graph import capture as capture
from slimdown.capture.graph import export_any_batch as export_any_batch
from slimdown.capture.graph import has_dynamic_batch as has_dynamic_batch
from slimdown.capture.graph import require_dynamic_batch as require_dynamic_batch
