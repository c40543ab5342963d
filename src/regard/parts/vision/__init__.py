"""Where the images are in the sequences of a vision-language model, what each of their tokens
shows of the user's picture, and the stack that reads them.

The models meant here project the patches of an image into the token sequence of their language
model. `layouts.FAMILIES` is the table of those whose arrangement of patches is known; the images
of any other model are found, and have no grid.
"""

from .layouts import FAMILIES, family
from .places import Encoded, Images, locate
from .stack import decoder, has_class_token, layer_sites
from .views import Box, Grid, View, panels

__all__ = [
    "FAMILIES",
    "Box",
    "Encoded",
    "Grid",
    "Images",
    "View",
    "decoder",
    "family",
    "has_class_token",
    "layer_sites",
    "locate",
    "panels",
]
