"""The model, the stream of batches, the training step, fine-tuning, evaluation and export."""
