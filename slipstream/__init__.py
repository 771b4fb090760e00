"""The mechanisms behind the scripts: embedding table, staleness, batching, training loop."""
