"""What decoding with Task-KV costs: its row of `regard bench decode`."""

DECODE = {
    "title": "Task-KV, ratio 0.4",
    "settings": {"ratio": 0.4},
    "targets": [
        {"least": 1.3, "rule": "Task-KV: at least 1.3 times the tokens a second"},
        {
            "most": 0.4 * 1.02,
            "rule": "Task-KV: once the prompt is read, at most 0.4 x 1.02 of the stock cache's "
            "bytes, counted from storage",
        },
    ],
}
