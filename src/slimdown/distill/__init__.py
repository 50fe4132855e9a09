"""Training that wins accuracy back: one loop for distillation, fine-tuning and QAT."""

from slimdown.distill.loop import Trained as Trained
from slimdown.distill.loop import train as train
from slimdown.distill.randomness import seed_everything as seed_everything
from slimdown.distill.settings import TrainSettings as TrainSettings
from slimdown.distill.stage import Distill as Distill
