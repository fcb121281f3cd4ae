"""Parts of rules that several benchmarks share: text in, a verdict out."""
