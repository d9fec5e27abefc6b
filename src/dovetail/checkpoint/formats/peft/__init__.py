"""peft's adapters, both ways."""

from dovetail.checkpoint.formats.peft.read import import_peft
from dovetail.checkpoint.formats.peft.write import export_peft

__all__ = ["export_peft", "import_peft"]
