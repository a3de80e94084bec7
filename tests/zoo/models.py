"""The zoo: real architectures at small random configurations. It holds models only; the package knows none of them."""

from __future__ import annotations

from tests.zoo import torch_images, torch_models, torch_special, transformers_lms, transformers_models
from tests.zoo.entry import Entry

__all__ = ["ZOO", "Entry"]

ZOO: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        *transformers_lms.ENTRIES,
        *transformers_models.ENTRIES,
        *torch_models.ENTRIES,
        *torch_images.ENTRIES,
        *torch_special.ENTRIES,
    )
}
