"""What comes with the package: real and tiny models, and texts to look at.

>>> "northanger-abbey" in texts() and [entry.name for entry in models()][0]
'smollm2-135m'
"""

from regard.zoo.audio import Audio, clip, clips
from regard.zoo.cache import cache_dir
from regard.zoo.entries import Entry, models
from regard.zoo.loading import load, tokenizer_of
from regard.zoo.options import Loading
from regard.zoo.passages import text, texts
from regard.zoo.pipelines import load_pipeline
from regard.zoo.tiny import FAMILIES, inputs, tiny

__all__ = [
    "load",
    "Loading",
    "load_pipeline",
    "models",
    "Entry",
    "tokenizer_of",
    "text",
    "texts",
    "Audio",
    "clip",
    "clips",
    "tiny",
    "inputs",
    "FAMILIES",
    "cache_dir",
]
