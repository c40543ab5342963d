"""The card of Pixel Linguist."""

from regard.cards import Card, Paper

CARD = Card(
    slug="pixel-linguist",
    name="Pixel Linguist",
    verb="shape",
    does="sentence embeddings read from the picture of the text",
    paper=Paper("Pixel Sentence Representation Learning", "Xiao et al.", 2024, "2402.08183"),
    families=("ViT",),
)
