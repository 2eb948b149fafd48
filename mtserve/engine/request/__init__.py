"""One request: what it asks, and the history that it is asked over."""
