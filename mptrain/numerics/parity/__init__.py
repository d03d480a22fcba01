"""The parity run: the same start and the same batches in float32 and in 16 bits, and where the two part."""
