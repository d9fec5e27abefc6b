"""Adapters: trainable links, one method a file. Importing this package registers them."""

from dovetail.links.adapt.adalora import AdaLoRA
from dovetail.links.adapt.bottleneck import Bottleneck
from dovetail.links.adapt.dora import DoRA
from dovetail.links.adapt.ia3 import IA3
from dovetail.links.adapt.loha import LoHa
from dovetail.links.adapt.lora import LoRA
from dovetail.links.adapt.scales import Scales
from dovetail.links.adapt.vera import VeRA
