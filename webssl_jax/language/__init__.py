"""Language models of the Llama family: the decoder, its weights and tokenizers, generation."""
