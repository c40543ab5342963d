"""What decoding with Recycled Attention costs: its row of `regard bench decode`."""

DECODE = {
    "row": "recycled",
    "title": "Recycled, budget 1024, stride 16",
    "settings": {"budget": 1024, "stride": 16},
    "targets": [{"least": 1.6, "rule": "Recycled: at least 1.6 times the tokens a second"}],
    "note": "Recycled keeps every row, so it holds more; a written token reads {entries:.0f} keys "
    "in each key head on average, where stock reads all.",
}
