"""Search: the latency, quality and size front that a space of recipes reaches on a target."""
