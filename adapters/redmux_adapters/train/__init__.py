"""Training RED adapters, many at once over one frozen base model."""

from .base import TrainingBase, load_training_base
from .events import Evaluated, Event, Finished, Stepped
from .examples import Example
from .learner import Task
from .options import TrainingOptions, default_learning_rate
from .trainer import Estimate, Trainer

__all__ = [
    "Estimate",
    "Evaluated",
    "Event",
    "Example",
    "Finished",
    "Stepped",
    "Task",
    "Trainer",
    "TrainingBase",
    "TrainingOptions",
    "default_learning_rate",
    "load_training_base",
]
