"""Texts to vectors: encoders of the BERT family, their batches, and the engine face that the service knows."""
