"""How to compute: the decoder, its families, weights in and out, sharding, generation."""
