"""How anything is judged: claims and their verdicts, trials, benches."""
