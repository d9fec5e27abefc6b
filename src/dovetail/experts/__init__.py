"""Task experts: adapters and fine-tuned models as ternary task vectors, near the entropy limit."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
