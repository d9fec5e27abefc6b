"""Adapters: trainable links, one method a file. Importing this package registers them."""

from dovetail.adapt.bottleneck import Bottleneck
from dovetail.adapt.dora import DoRA
from dovetail.adapt.ia3 import IA3
from dovetail.adapt.loha import LoHa
from dovetail.adapt.lora import LoRA
from dovetail.adapt.vera import VeRA

__all__ = ["IA3", "Bottleneck", "DoRA", "LoHa", "LoRA", "VeRA"]
