"""Whether an answer is right: text in, verdict out. No tensors, no processes, no files."""
