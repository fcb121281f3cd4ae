"""Visual instruction tuning: a frozen encoder, a connector and a language model."""
