"""Visual question answering: questions of published benchmarks, answers kept, rules apart."""
