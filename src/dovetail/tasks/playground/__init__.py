"""An embedded language model and tasks to tune it on, so that everything works offline at once."""

from pathlib import Path

from dovetail.tasks.playground.tasks import TASKS, task

MODEL_DIR = Path(__file__).parent / "model"
"""The pretrained model, a standard Hugging Face checkpoint."""

__all__ = ["MODEL_DIR", "TASKS", "task"]
