"""Model references and data sets -> modules and tasks."""

from slimdown.load.check import check_model as check_model
from slimdown.load.classification import ClassificationTask as ClassificationTask
from slimdown.load.data import load_task as load_task
from slimdown.load.images import DataWarning as DataWarning
from slimdown.load.model import load_model as load_model
from slimdown.load.preprocess import apply_preprocess as apply_preprocess
from slimdown.load.reference import runs_user_code as runs_user_code
from slimdown.load.source import DataSource as DataSource
from slimdown.load.source import ModelSource as ModelSource
