"""The sampler's inside: the next token, its cache, its loop, its queue."""
