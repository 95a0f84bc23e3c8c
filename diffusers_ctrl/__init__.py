"""New conditional controls for pre-trained diffusion models, by reinforcement learning (CTRL, arXiv 2406.12120)."""

from .classifiers import Classifier
from .config import CTRLConfig
from .label_encoder import LabelEncoder
from .labels import Categorical, Continuous, LabelSpace
from .pipelines import CTRLPipeline
from .policy import Policy
from .schedulers import MemorylessFlowMatchScheduler
from .trainer import CTRLTrainer
from .transitions import Transition, transition


__version__ = "0.1.0"

__all__ = [
    "CTRLConfig",
    "CTRLPipeline",
    "CTRLTrainer",
    "Categorical",
    "Classifier",
    "Continuous",
    "LabelEncoder",
    "LabelSpace",
    "MemorylessFlowMatchScheduler",
    "Policy",
    "Transition",
    "transition",
]
